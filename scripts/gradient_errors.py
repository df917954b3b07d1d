"""How far each precision's loss and gradients are from fp32's at the same weights and samples, where curves are subject
to chance: two that differ by rounding alone soon are two curves.

    python scripts/gradient_errors.py --config recipes/pythia_1.4b.yaml --precisions bf16 fp8 --after 0 100 \
        --set train.global_batch_size=8 train.per_device_train_batch_size=8 train.per_device_eval_batch_size=4

Trains in bf16 by a schedule of `--steps`, and after each number of steps (`--after`) prints, of the samples held out,
by how much each precision's loss differs from fp32's; and of some of them, for each kind of matrix, the distance of the
gradient from fp32's by the norm of that, and their cosine. `torch:` before a precision: without kernels, as fp32 is.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from compare_precisions import WITHOUT_KERNELS, overrides
from torch import Tensor
from transformers import TrainerCallback

from neox_hf.data import EvaluationBatches
from neox_hf.modeling import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_hf.modeling.fp8_layers import compute_in_fp8, refresh_fp8_weights
from neox_hf.training.precision import Precision, cast_weights, precision_of
from neox_hf.training.pretraining import build_trainer
from neox_hf.training.recipe import load_recipe

TRUTH = "torch:fp32"
PRECISIONS = [
    f"{kernels}{precision}" for kernels in ("", WITHOUT_KERNELS) for precision in ("fp32", "amp", "bf16", "fp8")
]
"""Not fp16, whose gradients vanish without a loss scale, nor pure_bf16, which is bf16 but for the optimizer."""
STEPS_FOR_SCALES = 2

Weights = dict[str, Tensor]


class Captures(TrainerCallback):
    """Keeps the weights after some steps, in `weights`, on the host; ends the run at the last."""

    def __init__(self, after: list[int]) -> None:
        self.after = after
        self.weights: dict[int, Weights] = {}

    def on_train_begin(self, args, state, control, model, **kwargs: object) -> None:
        self._take(0, control, model)

    def on_step_end(self, args, state, control, model, **kwargs: object) -> None:
        self._take(state.global_step, control, model)

    def _take(self, step: int, control, model) -> None:
        if step in self.after:
            self.weights[step] = {name: tensor.to("cpu", copy=True) for name, tensor in model.state_dict().items()}
        control.should_training_stop = step >= max(self.after)


def capture(options: argparse.Namespace, folder: Path) -> tuple[dict[int, Weights], GPTNeoXConfig, EvaluationBatches]:
    """Weights after each of `options.after` steps, the model's configuration, and what is held out."""
    recipe = load_recipe(options.config, overrides=overrides(options, "bf16", folder))
    args = recipe.training_arguments()
    trainer = build_trainer(recipe, args, recipe.topology(args.world_size, args.process_index).connect())
    captures = Captures(options.after)
    trainer.add_callback(captures)
    trainer.train()
    trainer.loader.close()
    return captures.weights, trainer.model.config, trainer.eval_dataset


def at_weights(
    weights: Weights, config: GPTNeoXConfig, precision: Precision, kernels: str, device: torch.device
) -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig.from_dict(config.to_dict() | {"kernels": kernels})
    with device:
        model = GPTNeoXForCausalLM(config)
    cast_weights(model, precision.weights).load_state_dict(weights)
    return model.train()


def prepare(model: GPTNeoXForCausalLM, batch: dict[str, Tensor]) -> None:
    """Have `model` train in eight bits, with scales of passes before."""
    scales = compute_in_fp8(model)
    refresh_fp8_weights(model)
    for _ in range(STEPS_FOR_SCALES):
        loss_of(model, batch, autocast=False).backward()
        model.zero_grad()
        scales.advance()
        refresh_fp8_weights(model)


def loss_of(model: GPTNeoXForCausalLM, batch: dict[str, Tensor], autocast: bool) -> Tensor:
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        return model(**batch, skip_logits=True).loss


def measure(
    name: str, weights: Weights, config: GPTNeoXConfig, batches: EvaluationBatches, gradients: int, device: torch.device
) -> tuple[list[float], Weights]:
    """The loss of each batch, and the gradient of the sum of the first `gradients` of them, in fp32."""
    precision = precision_of(name.removeprefix(WITHOUT_KERNELS))
    kernels = "torch" if name.startswith(WITHOUT_KERNELS) else "auto"
    model = at_weights(weights, config, precision, kernels, device)
    if precision.fp8:
        prepare(model, batches[len(batches) - 1])
    losses, total = [], {}
    for number, batch in enumerate(batches):
        with torch.set_grad_enabled(number < gradients):
            loss = loss_of(model, batch, precision.autocast)
        losses.append(loss.item())
        if number < gradients:
            loss.backward()
            for key, parameter in model.named_parameters():
                total[key] = total.get(key, 0) + parameter.grad.float()
            model.zero_grad()
    return losses, total


def matrices(gradients: Weights, config: GPTNeoXConfig) -> Iterator[tuple[str, Tensor]]:
    """Each matrix and its kind: its name without its layer; of the fused projection, each part."""
    for name, gradient in gradients.items():
        kind = ".".join(part for part in name.removeprefix("gpt_neox.layers.").split(".")[:-1] if not part.isdigit())
        if kind.endswith("query_key_value") and gradient.dim() == 2:
            parts = gradient.view(config.num_attention_heads, 3, -1, gradient.shape[-1]).unbind(1)
            yield from zip((f"{kind}, {part}" for part in ("query", "key", "value")), parts, strict=True)
        elif gradient.dim() == 2:
            yield kind, gradient


def distances(found: Weights, truth: Weights, config: GPTNeoXConfig) -> dict[str, tuple[float, float]]:
    """By kind of matrix: |found - truth| / |truth|, and the cosine between the two."""
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(4))
    for (kind, mine), (_, right) in zip(matrices(found, config), matrices(truth, config), strict=True):
        products = (mine - right, mine - right), (right, right), (mine, mine), (mine, right)
        sums[kind] += torch.stack([(a * b).sum().cpu() for a, b in products])
    return {
        kind: ((apart / length).sqrt().item(), (inner / (length * own).sqrt()).item())
        for kind, (apart, length, own, inner) in sums.items()
    }


def report(step: int, losses: dict[str, list[float]], found: dict[str, dict[str, tuple[float, float]]]) -> None:
    truth = torch.tensor(losses[TRUTH])
    print(f"after {step} steps, {len(truth)} batches: loss {truth.mean():.4f} in {TRUTH}")
    for name in found:
        ratio = torch.tensor(losses[name]) / truth - 1
        print(f"  {name:12} {ratio.mean():+.4%} in the mean, {ratio.abs().max():.4%} at most")
    for kind in next(iter(found.values())):
        print(f"  {kind:32}" + "".join(f"{name:>14} {by[kind][0]:.4f} {by[kind][1]:.5f}" for name, by in found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", nargs="+", required=True)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16", "torch:bf16", "fp8"])
    parser.add_argument("--after", nargs="+", type=int, default=[0, 100], help="steps of training in bf16")
    parser.add_argument("--steps", type=int, default=500, help="of the schedule")
    parser.add_argument("--gradients", type=int, default=1, help="batches whose gradient is compared")
    parser.add_argument("--set", nargs="+", default=[], help="overrides, as of recipes/pretrain.py")
    options = parser.parse_args()
    if not 0 <= min(options.after) <= max(options.after) <= options.steps:
        parser.error(f"--after {options.after} must lie within the schedule's 0 to {options.steps} steps (--steps)")
    with tempfile.TemporaryDirectory() as folder:
        captured, config, batches = capture(options, Path(folder))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for step, weights in captured.items():
            given = weights, config, batches, options.gradients, device
            losses, found = {}, {}
            losses[TRUTH], truth = measure(TRUTH, *given)
            for name in options.precisions:
                losses[name], gradients = measure(name, *given)
                found[name] = distances(gradients, truth, config)
            report(step, losses, found)


if __name__ == "__main__":
    main()
