"""Linears whose three products are in eight bits.

    y = x weight^T + bias        dx = dy weight        dweight = dy^T x        dbias = sum over tokens of dy

Shapes: x [..., in], weight [out, in], bias [out] or None; returns [..., out] in x's dtype, gradients likewise, that of
the weight in the dtype it is summed in. Weights and activations are e4m3, gradients e5m2, each scaled as a whole
(`fp8_scales`). Kept for the backward pass: x in eight bits, transposed, half of what half precision keeps.

A linear has its `Fp8Linear`: three slots in the table of scales, and its weight in eight bits, made once a step.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from neox_hf.kernels.fp8_cast import FP8_CAST, fp8_cast
from neox_hf.kernels.fp8_format import E4M3, E5M2, MULTIPLE, Fp8Tensor, empty_fp8, padded
from neox_hf.kernels.fp8_gradient import cast_gradient
from neox_hf.kernels.fp8_product import add_fp8_product_, fp8_product
from neox_hf.kernels.fp8_scales import Fp8Scales, ScaleSlot
from neox_hf.kernels.gradient_dtype import gradient_dtype
from neox_hf.kernels.once_differentiable import once_differentiable
from neox_hf.kernels.weight_gradient import GradientSum, sum_of


def slot_dtypes(names: Iterable[str], gradient: torch.dtype = E5M2) -> dict[str, torch.dtype]:
    """The slots of the linears called `names`, for the table."""
    parts = {"input": E4M3, "weight": E4M3, "gradient": gradient}
    return {f"{name}.{part}": dtype for name in names for part, dtype in parts.items()}


def reason_against_fp8(weight: Tensor) -> str | None:
    """Why a linear of this weight cannot be computed in eight bits, for the log; None if it can."""
    odd = [size for size in weight.shape if size % MULTIPLE]
    if not odd:
        return None
    return f"its weight is {list(weight.shape)}, and eight-bit products want multiples of {MULTIPLE}"


class Fp8Weight:
    """A weight [out, in] in eight bits, both ways, in memory that stays where it is.

    Made again when the table has advanced, which it does with every optimizer step, and when torch knows that the
    weight was written to or replaced.
    """

    def __init__(self, slot: ScaleSlot, backend: str = "auto") -> None:
        self.slot = slot
        self.backend = backend
        self._made_of: tuple[int, ...] | None = None
        self._made: Fp8Tensor | None = None
        self.addresses: tuple[int, int] | None = None  # of the casts, once there are any

    def of(self, weight: Tensor) -> Fp8Tensor:
        made_of = (weight.data_ptr(), weight._version, self.slot.table.epoch)
        if self._made is None or made_of != self._made_of:
            self.refresh(weight)
        return self._made

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Make it now: in time for a graph that reads it, but does not make it."""
        if self._made is None or self._made.rows.device != weight.device:
            rows, columns = weight.shape
            self._rows = empty_fp8(rows, columns, self.slot.dtype, weight.device)
            self._columns = empty_fp8(columns, padded(rows), self.slot.dtype, weight.device)
            self._made = None
            self.addresses = self._rows.data_ptr(), self._columns.data_ptr()
        source = weight.detach()
        scale, inverse = self.slot.for_values(source)
        FP8_CAST.choose(self.backend, source)(source, scale, self.slot.amax, self._rows, self._columns, None)
        self._note(weight, inverse)

    def was_written(self, weight: Tensor) -> None:
        """Someone else has made it, of `weight` and with the slot's own scale."""
        increment_version((self._rows, self._columns))
        self._note(weight, self.slot.inverse)

    def _note(self, weight: Tensor, inverse: Tensor) -> None:
        if self._made is None or self._made.inverse is not inverse:
            self._made = Fp8Tensor(self._rows, self._columns, inverse)
        self._made_of = (weight.data_ptr(), weight._version, self.slot.table.epoch)


class Fp8Linear:
    """What one linear needs beside its parameters. backend: who casts for it."""

    def __init__(self, table: Fp8Scales, name: str, backend: str = "auto") -> None:
        self.backend = backend
        self.input = table.slots[f"{name}.input"]
        self.gradient = table.slots[f"{name}.gradient"]
        self.weight = Fp8Weight(table.slots[f"{name}.weight"], backend)


@dataclass(frozen=True)
class GradientTaker:
    """Takes the gradient of one weight: for `total`, if that sums it, else for autograd.

    wanted: whether there is to be one. operand: what the autograd function is given as the weight; detached where
    autograd is to hear nothing of its gradient.
    """

    weight: Tensor
    total: GradientSum | None
    wanted: bool

    @classmethod
    def of(cls, weight: Tensor, x: Tensor) -> "GradientTaker":
        """For a linear of x. Without a gradient for x, nothing but the weight might bring about a backward pass."""
        wanted = weight.requires_grad and torch.is_grad_enabled()
        return cls(weight, sum_of(weight) if wanted and x.requires_grad else None, wanted)

    @property
    def operand(self) -> Tensor:
        return self.weight if self.total is None else self.weight.detach()

    def take(self, gradient: Fp8Tensor, x: Fp8Tensor) -> Tensor | None:
        """gradient^T x [out, in], made from columns, if autograd wants it; else it is added to the sum."""
        if not self.wanted:
            return None
        factors = (gradient.columns, x.columns, gradient.inverse, x.inverse)
        if self.total is None:
            return fp8_product(*factors, gradient_dtype(self.weight))
        self.total.add_by(self.weight, lambda total, keep: add_fp8_product_(total, *factors, keep=keep))
        return None


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, bias: Tensor | None, taker: GradientTaker, state: Fp8Linear) -> Tensor:
        x8, _ = fp8_cast(x.flatten(0, -2), state.input, columns=taker.wanted, backend=state.backend)
        weight8 = state.weight.of(taker.weight)
        ctx.taker, ctx.state = taker, state
        ctx.sum_dtype = gradient_dtype(bias) if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(x8.columns, x8.inverse, weight8.columns, weight8.inverse)
        y = fp8_product(x8.rows, weight8.rows, x8.inverse, weight8.inverse, x.dtype, bias=bias, fast=True)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        columns, inverse, weight_columns, weight_inverse = ctx.saved_tensors
        taker, state, wants_x = ctx.taker, ctx.state, ctx.needs_input_grad[0]
        dy8, dbias = cast_gradient(
            dy,
            state.gradient,
            rows=wants_x,
            columns=taker.wanted,
            sum_dtype=ctx.sum_dtype,
            backend=state.backend,
        )
        dx = None
        if wants_x:
            dx = fp8_product(dy8.rows, weight_columns, dy8.inverse, weight_inverse, dy.dtype)
            dx = dx.view(*dy.shape[:-1], dx.shape[-1])
        return dx, taker.take(dy8, Fp8Tensor(None, columns, inverse)), dbias, None, None


def check_fits(x: Tensor, weight: Tensor) -> None:
    """Raises ValueError unless x [..., in] and weight [out, in] go together in eight bits."""
    reason = reason_against_fp8(weight)
    if reason is not None:
        raise ValueError(f"a linear cannot be computed in fp8: {reason}; leave it in bf16")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"an fp8 linear was given x {list(x.shape)} for a weight {list(weight.shape)}: [..., in], [out, in]"
        )


@torch.compiler.disable  # what is remembered from step to step is no part of a graph
def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, state: Fp8Linear) -> Tensor:
    """x weight^T + bias in eight bits, for training: every call counts for the scales of the steps to come.

    Raises:
        ValueError: a side of the weight is no multiple of 16, or x does not fit it.
    """
    check_fits(x, weight)
    taker = GradientTaker.of(weight, x)
    return _Fp8Linear.apply(x, taker.operand, bias, taker, state)
