"""What HF's Trainer offers and a split model cannot give, refused by name."""

from typing import TYPE_CHECKING, Any

from neox_hf.data import EvaluationBatches, TokenStream
from neox_hf.modeling.stage import Stage
from neox_hf.parallel.topology import Topology

if TYPE_CHECKING:
    from neox_hf.training.trainer import NeoXTrainer

WAY_OUT = "use a layout with parallel.tensor=1 and parallel.pipeline=1, or do without it"


def check_trainer(trainer: "NeoXTrainer") -> None:
    """Refuse what the pipeline engine cannot do.

    Raises:
        ValueError: with its name and the way out.
    """
    args = trainer.args
    reasons = {
        "compute_metrics": (trainer.compute_metrics, "the logits never leave the last stage's ranks"),
        "preprocess_logits_for_metrics": (
            trainer.preprocess_logits_for_metrics,
            "the logits never leave the last stage's ranks",
        ),
        "compute_loss_func": (trainer.compute_loss_func, "the last stage computes the language model's own loss"),
        "model_init (hyper-parameter search)": (trainer.model_init, "a split model is laid out once"),
        "auto_find_batch_size": (args.auto_find_batch_size, "the ranks would not find the same size"),
        "neftune_noise_alpha": (args.neftune_noise_alpha, "only the first stage has the embedding"),
        "average_tokens_across_devices=False": (
            not args.average_tokens_across_devices,
            "a replica's loss is divided by the labels of all of them",
        ),
        "label_smoothing_factor": (args.label_smoothing_factor, "the last stage computes the loss without it"),
    }
    for name, (given, reason) in reasons.items():
        if given:
            raise ValueError(f"{name} does not work with {trainer.topology}: {reason}; {WAY_OUT}")
    for name, wanted in (("train_dataset", TokenStream), ("eval_dataset", EvaluationBatches)):
        found = getattr(trainer, name)
        if found is not None and not isinstance(found, wanted):
            raise ValueError(
                f"{name} is a {type(found).__name__}; with {trainer.topology} it must be of {wanted.__name__}, "
                "which gives all ranks of a replica the same batches"
            )
    if not args.deepspeed:
        raise ValueError(
            f"{trainer.topology} needs DeepSpeed: pass deepspeed=deepspeed_config(...) of "
            "neox_hf.training.deepspeed_config to the training arguments"
        )


def check_trains(stage: Stage, topology: Topology) -> None:
    """Refuse a stage where everything is frozen: DeepSpeed's optimizer would fail there, and other stages wait for it.

    Raises:
        ValueError: it is one.
    """
    if not any(parameter.requires_grad for parameter in stage.parameters()):
        raise ValueError(
            f"nothing is trained on pipeline stage {topology.pipeline_rank} of {topology.pipeline}: every parameter "
            "there is frozen, and DeepSpeed's optimizer needs one; use parallel.pipeline=1, or fewer stages"
        )


def check_batches(found: int, wanted: int) -> None:
    """Refuse a step with fewer micro-batches than DeepSpeed will ask for: its ranks would wait for ever.

    Raises:
        ValueError: the two differ.
    """
    if found != wanted:
        raise ValueError(
            f"a step has {found} micro-batches where gradient_accumulation_steps={wanted}: a pipeline cannot train on "
            "an epoch's remainder; use a stream without end, or set max_steps to whole steps"
        )


def check_prediction(batches: Any, loss_only: bool | None) -> None:
    """Refuse an evaluation that is to return logits, or batches that are not the same on all ranks of a replica.

    Raises:
        ValueError: it is so.
    """
    if not loss_only:
        raise ValueError(
            "predict does not work with a split model: the logits never leave the last stage's ranks; save the model "
            "and load it in one process, or set prediction_loss_only=True for the loss alone"
        )
    if not isinstance(batches, EvaluationBatches):
        raise ValueError(
            f"evaluation over a {type(batches).__name__}; a split model is evaluated over EvaluationBatches, which "
            "give all ranks of a replica the same batches (neox_hf.data.evaluation_batches)"
        )
