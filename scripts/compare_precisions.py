"""Loss curves of one recipe in several precisions, and of transformers' class: the same first weights and samples.

    python scripts/compare_precisions.py --config recipes/pythia_160m.yaml --precisions bf16 fp8 --steps 500 \
        --set train.global_batch_size=32
    python scripts/compare_precisions.py --config recipes/pythia_160m.yaml --precisions stock:amp amp bf16 --steps 200
    torchrun --standalone --nproc-per-node 1 scripts/compare_precisions.py --config recipes/pythia_160m.yaml \
        --precisions stock:fp16 fp16 --steps 200 --set parallel.zero_stage=1        # DeepSpeed's loss scale

`stock:` before a precision trains transformers' own class, with its own operations, instead of ours; `torch:` ours
without its kernels. That one tells how far apart two runs of one precision may come by rounding alone: what is nearer
says nothing. Prints the mean loss of each window of steps, how far each run is from the first one, and the loss at the
end of the documents that the recipe has to hold out, which is computed in the precision of the weights.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from transformers import GPTNeoXConfig as StockConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM as StockForCausalLM

from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.pretraining import build_trainer
from neox_hf.training.recipe import Recipe, load_recipe
from neox_hf.training.trainer import NeoXTrainer

STOCK = "stock:"
WITHOUT_KERNELS = "torch:"


def overrides(options: argparse.Namespace, name: str, folder: Path) -> list[str]:
    fixed = {
        "train.precision": name.removeprefix(STOCK).removeprefix(WITHOUT_KERNELS),
        **({"model.kernels": "torch"} if name.startswith(WITHOUT_KERNELS) else {}),
        "train.max_steps": options.steps,
        "train.output_dir": folder,
        "train.save_schedule": "none",
        "train.logging_steps": 1,
        "train.eval_strategy": "steps",
        "train.eval_steps": 2 * options.steps,  # never in training: at its end, by hand
        "train.report_to": "none",
        "train.disable_tqdm": True,
        "train.peak_tflops": 1,
        "train.resume_from_checkpoint": "null",
    }
    return [*options.set, *(f"{key}={value}" for key, value in fixed.items())]


def losses(recipe: Recipe, stock: bool) -> tuple[list[float], list[float], float]:
    """Loss and gradient norm of each step, and the loss of the documents held out, at the end."""
    args = recipe.training_arguments()
    trainer = build_trainer(recipe, args, recipe.topology(args.world_size, args.process_index).connect())
    if stock:
        trainer = of_stock_model(trainer, recipe.training_arguments())
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    held_out = trainer.evaluate()["eval_loss"]
    trainer.loader.close()
    return [entry["loss"] for entry in logs], [entry["grad_norm"] for entry in logs], held_out


def of_stock_model(trainer: NeoXTrainer, args: NeoXTrainingArguments) -> NeoXTrainer:
    """The same run of transformers' class, from the same weights.

    args: made after `trainer`, whose own serve no second one: Accelerate takes one DeepSpeed configuration a process
    until new arguments begin anew.
    """
    ours = trainer.model
    model = StockForCausalLM(StockConfig.from_dict(ours.config.to_dict()))
    model.load_state_dict(ours.state_dict())
    return NeoXTrainer(
        model,
        args,
        topology=trainer.topology,
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset,
        processing_class=trainer.processing_class,
        workers=trainer.workers,
        locked=True,
    )


def windows(curve: list[float], size: int) -> list[float]:
    return [statistics.fmean(curve[start : start + size]) for start in range(0, len(curve) - size + 1, size)]


def report(curves: dict[str, list[float]], held_out: dict[str, float], size: int) -> None:
    first, *others = curves
    print(f"steps       {first:>10}" + "".join(f"{name:>20}" for name in others))
    rows = {name: windows(curve, size) for name, curve in curves.items()}
    for number, truth in enumerate(rows[first]):
        print(
            f"{number * size + 1:>5}-{(number + 1) * size:<5} {_beside(truth, [rows[name][number] for name in others])}"
        )
    print(f"held out    {_beside(held_out[first], [held_out[name] for name in others])}")
    for name in others:
        whole = statistics.fmean(curves[name]) / statistics.fmean(curves[first]) - 1
        apart = [abs(b / a - 1) for a, b in zip(curves[first], curves[name], strict=True)]
        print(
            f"{name}: the mean loss is {whole:+.3%} from that of {first}; "
            f"steps are {statistics.fmean(apart):.3%} apart in the mean, {max(apart):.3%} at most"
        )


def _beside(truth: float, found: list[float]) -> str:
    return f"{truth:>10.4f}" + "".join(f"{loss:>11.4f} {loss / truth - 1:>+8.3%}" for loss in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", nargs="+", required=True)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--window", type=int, default=50)
    parser.add_argument("--set", nargs="+", default=[], help="overrides, as of recipes/pretrain.py")
    parser.add_argument("--json", type=Path, help="write every loss and gradient norm here")
    options = parser.parse_args()
    curves: dict[str, list[float]] = {}
    norms: dict[str, list[float]] = {}
    held_out: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.precisions:
            recipe = load_recipe(options.config, overrides=overrides(options, name, Path(folder) / name))
            curves[name], norms[name], held_out[name] = losses(recipe, name.startswith(STOCK))
            if options.json:  # after each run, for a comparison that is cut short
                options.json.write_text(json.dumps({"losses": curves, "norms": norms, "held out": held_out}))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    report(curves, held_out, options.window)


if __name__ == "__main__":
    main()
