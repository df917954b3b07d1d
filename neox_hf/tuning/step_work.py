"""What a step does outside of its layers, at a recipe's sizes: the optimizer over all parameters, and the loss."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from neox_hf.kernels import AdamWRates, AdamWTensors, TensorTables, adamw_, gradient_square_sum
from neox_hf.kernels.chunked_losses import KERNEL_BYTES_AT_ONCE, default_chunk
from neox_hf.kernels.softmax_rows import losses_and_gradient_
from neox_hf.kernels.split_fp32 import split_fp32
from neox_hf.tuning.inputs import Random
from neox_hf.tuning.sizes import Sizes
from neox_hf.tuning.work import Call, Work

RATES = AdamWRates(lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)

MOST_PARAMETERS = 2**28
"""Parameters that an optimizer's step is timed with: many times more than fill a device, and a few GB."""


def step_work(s: Sizes) -> list[Work]:
    """What takes longest first."""
    return [*optimizer_work(s), *loss_work(s)]


def optimizer_work(s: Sizes) -> Iterator[Work]:
    """A step, and the norm that it clips by, over matrices like the MLP's and vectors like the norms'."""
    if s.parameters == 0:
        return
    matrices = max(min(s.parameters, MOST_PARAMETERS) // (s.hidden * s.inner), 1)
    shapes = [(s.inner, s.hidden), (s.hidden,)] * matrices

    def step(random: Random) -> Call:
        def draw(dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
            return [random.values(dtype, *shape, scale=scale) for shape in shapes]

        wide = torch.float32 if s.master else s.stream
        tensors, tables = _optimizer_tensors(draw, s, wide), TensorTables()

        def call() -> tuple[Tensor, ...]:
            adamw_(tensors, RATES, tables=tables, backend="triton")
            return *tensors.weights, *tensors.exp_avgs, *tensors.exp_avg_sqs

        return call

    def norm(random: Random) -> Call:
        gradients, tables = [random.values(s.gradient, *shape) for shape in shapes], TensorTables()
        return lambda: (gradient_square_sum(gradients, tables=tables, backend="triton"),)

    yield Work("AdamW", step)
    yield Work("gradient norm", norm)


def _optimizer_tensors(draw: Callable[..., list[Tensor]], s: Sizes, wide: torch.dtype) -> AdamWTensors:
    own, remainders = draw(wide, 0.02), None
    if s.master:
        own, remainders = map(list, zip(*map(split_fp32, own), strict=True))
    return AdamWTensors(
        weights=own,
        gradients=draw(s.gradient),
        masters=remainders,
        exp_avgs=draw(wide, 0.1),
        exp_avg_sqs=[values.abs_() for values in draw(wide, 0.1)],
        steps=[torch.zeros((), device=weight.device) for weight in own],
    )


def loss_work(s: Sizes) -> Iterator[Work]:
    """A chunk of the head's logits, turned into its loss and its gradient."""
    if s.vocabulary is None:
        return
    rows = min(default_chunk(s.tokens, s.vocabulary, KERNEL_BYTES_AT_ONCE // s.product.itemsize), s.tokens)

    def prepare(random: Random) -> Call:
        logits, labels = random.values(s.product, rows, s.vocabulary), random.words(rows, s.vocabulary)
        losses = torch.empty(rows, dtype=torch.float32, device=random.device)

        def call() -> tuple[Tensor, ...]:
            losses_and_gradient_(logits, labels, losses, words=s.vocabulary, ignore_index=-100)
            return losses, logits

        return call

    yield Work("loss and gradient of logits", prepare)
