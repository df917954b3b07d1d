"""What a finished run leaves behind: the final model with its card and loss curve, a sample of text, how to load it."""

from pathlib import Path

import torch

from neox_hf.checkpoint.directory import finished_checkpoints, finished_path, step_of
from neox_hf.checkpoint.hub import CardFacts, model_card, plot_loss_curve
from neox_hf.checkpoint.partitioned import is_partitioned
from neox_hf.modeling.accounting import parameter_count
from neox_hf.training.recipe import Recipe
from neox_hf.training.trainer import NeoXTrainer
from neox_hf.version import versions

LOSS_CURVE = "loss_curve.png"
PROMPT_TOKENS, SAMPLE_TOKENS = 16, 64
HYPERPARAMETERS = (
    "precision",
    "optim",
    "learning_rate",
    "min_lr",
    "lr_decay_style",
    "lr_scheduler_type",
    "lr_warmup_fraction",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
)
ARCHITECTURE = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "use_parallel_residual",
    "hidden_act",
)


def finish_run(trainer: NeoXTrainer, recipe: Recipe) -> int:
    """Write the final model and its papers, publish, and tell the user. Returns the exit code."""
    trainer.save_model()
    sample = sample_text(trainer) if takes_part_in_sampling(trainer) else "(no rank of a pipeline can generate alone)"
    if trainer.topology.rank != 0:
        return 0
    output_dir = Path(trainer.args.output_dir)
    trainer.save_state()
    plot_loss_curve(trainer.state.log_history, output_dir / LOSS_CURVE)
    (output_dir / "README.md").write_text(model_card(card_facts(trainer, recipe)), encoding="utf-8")
    print(f"\nsample of generated text:\n{sample}\n")
    published = trainer.publish(recipe.hub.wait_at_end)
    if published is not None:
        print(published)
    _tell(trainer, output_dir)
    return 1 if published is not None and published.pending and recipe.hub.require_push else 0


def card_facts(trainer: NeoXTrainer, recipe: Recipe) -> CardFacts:
    """What the model card tells of this run."""
    args, config = trainer.args, trainer.model.config
    output_dir = Path(args.output_dir)
    return CardFacts(
        repo_id=recipe.hub.repo_id or output_dir.name,
        license=recipe.hub.license,
        parameters=parameter_count(config),
        tokens=trainer.state.num_input_tokens_seen,
        steps=trainer.state.global_step,
        sources=[source.path for source in recipe.data.sources],
        model_type=config.model_type,
        architecture={name: getattr(config, name) for name in ARCHITECTURE},
        hyperparameters={name: _plain(getattr(args, name)) for name in HYPERPARAMETERS},
        revisions=[f"step{step_of(path)}" for path in reversed(finished_checkpoints(output_dir))],
        eval_loss=(evaluation_losses(trainer) or [None])[-1],
        loss_curve=LOSS_CURVE,
        versions=versions(),
    )


def evaluation_losses(trainer: NeoXTrainer) -> list[float]:
    """Every evaluation loss of the log, oldest first."""
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def takes_part_in_sampling(trainer: NeoXTrainer) -> bool:
    """Whether this rank must generate for rank 0 to do so: it does where the ranks hold parts of each layer."""
    if trainer.topology.pipeline > 1:
        return False
    parts = trainer.topology.tensor > 1 or any(is_partitioned(parameter) for parameter in trainer.model.parameters())
    return parts or trainer.topology.rank == 0


def sample_text(trainer: NeoXTrainer) -> str:
    """The start of a held-out sample, or of a document where nothing is held out, as the model goes on with it."""
    if trainer.eval_dataset is None:
        prompt = torch.tensor([[trainer.processing_class.eos_token_id]], device=trainer.args.device)
    else:
        prompt = next(iter(trainer.eval_dataset))["input_ids"][:1, :PROMPT_TOKENS].to(trainer.args.device)
    positions = trainer.model.config.max_position_embeddings
    prompt = prompt[:, : max(1, positions // 2)]
    trainer.model.eval()
    with torch.no_grad():
        tokens = trainer.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=min(SAMPLE_TOKENS, positions - prompt.shape[1]),
            do_sample=True,
            top_k=40,
            pad_token_id=trainer.processing_class.eos_token_id,
        )
    return trainer.processing_class.decode(tokens[0])


def _plain(value: object) -> object:
    """Enums of HF's as their text."""
    return getattr(value, "value", value)


def _tell(trainer: NeoXTrainer, output_dir: Path) -> None:
    if losses := evaluation_losses(trainer):
        drop = 100 * (1 - losses[-1] / losses[0])
        print(f"evaluation loss: {losses[0]:.4f} -> {losses[-1]:.4f} ({drop:.1f} % lower)")
    print(f"loss curve: {output_dir / LOSS_CURVE}")
    checkpoint = finished_path(output_dir, trainer.state.global_step)
    path = checkpoint if checkpoint.exists() and not trainer.args.load_best_model_at_end else output_dir
    print(f"checkpoint: {path}\nload it with:")
    print("    from transformers import AutoModelForCausalLM")
    print(f'    model = AutoModelForCausalLM.from_pretrained("{path}")')
