"""Norms over the last dimension, as the norm files use them: one differentiable function.

What is computed, and what `kind` and `measured` mean: `row_norm_kernels`. Shapes: x, branches and results [..., H];
weights and biases [H], a scale norm's weight one number.
"""

from typing import Any

import torch
from torch import Tensor

from neox_hf.kernels.gradient_dtype import gradient_dtype
from neox_hf.kernels.late_tensor import LateTensor, late_tensors, mark
from neox_hf.kernels.once_differentiable import once_differentiable
from neox_hf.kernels.row_norm_ops import row_norm_backward, row_norm_forward


class _RowNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        first: Tensor | None,
        second: Tensor | None,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor | None,
        bias2: Tensor | None,
        eps: float,
        kind: str,
        measured: int,
        passes_on: bool,
        late: tuple[LateTensor, ...],
    ) -> tuple[Tensor, ...]:
        affines = weight1, bias1, weight2, bias2
        outputs = row_norm_forward(x, first, second, *affines, eps, kind, measured)
        ctx.save_for_backward(x if first is None else outputs[0], *affines)
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.late = (eps, kind, measured), late
        needed = ctx.needs_input_grad[3:7]
        ctx.dtypes = [gradient_dtype(each) if wanted else None for each, wanted in zip(affines, needed, strict=True)]
        ctx.streams = passes_on or first is not None
        return (x.view_as(x), *outputs) if passes_on else tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        residual, dys = (upstream[0], upstream[1:]) if ctx.streams else (None, upstream)
        needed = ctx.needs_input_grad
        if all(dy is None for dy in dys):
            return *_for_branches(residual, needed), *[None] * 9
        x, *affines = ctx.saved_tensors
        dy1, dy2 = [torch.zeros_like(x) if dy is None else dy for dy in dys] if len(dys) == 2 else (*dys, None)
        wants_x, dtype = any(needed[:3]), _common(ctx.dtypes) if any(needed[3:7]) else None
        again = any(late.is_awaited for late in ctx.late)
        outputs = row_norm_backward(x, residual, dy1, dy2, *affines, *ctx.settings, wants_x, dtype, again)
        for late, y in zip(ctx.late, outputs[wants_x:], strict=False) if again else ():
            late.arrive(y)
        parameters = [None] * 4 if dtype is None else _unstack(outputs[-1], affines, ctx.dtypes)
        return *_for_branches(outputs[0] if wants_x else None, needed), *parameters, *[None] * 5


def _for_branches(gradient: Tensor | None, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of x and of what was added to it: one tensor for all."""
    return gradient, gradient if needed[1] else None, gradient if needed[2] else None


def _common(dtypes: list[torch.dtype | None]) -> torch.dtype:
    """What all gradients of parameters are summed up in: their dtype, or fp32 where they have several."""
    found = {*dtypes} - {None}
    return found.pop() if len(found) == 1 else torch.float32


def _unstack(stacked: Tensor, affines: list[Tensor | None], dtypes: list[torch.dtype | None]) -> list[Tensor | None]:
    """[parameters, H] -> the gradient of each parameter that wants one; there is a row for each parameter."""
    rows = iter(stacked.unbind(0))
    gradients = [None if each is None else next(rows) for each in affines]
    for place, (gradient, dtype) in enumerate(zip(gradients, dtypes, strict=True)):
        if dtype is None:
            gradients[place] = None
        elif gradient.dtype != dtype or gradient.shape != affines[place].shape:
            gradients[place] = gradient.view(affines[place].shape).to(dtype)
    return gradients


def row_norm(
    x: Tensor,
    affines: tuple[Tensor | None, ...],
    eps: float,
    *,
    kind: str,
    branches: tuple[Tensor | None, ...] = (None, None),
    measured: int | None = None,
    passes_on: bool = False,
    makes_again: bool = False,
) -> tuple[Tensor, ...]:
    """The norm(s) of x [..., H], differentiable; before them x itself, if it `passes_on`, or the sum with its branches.

    affines: weight and bias, or those of two norms. branches: what is added to x first. measured: elements of a row
    that an RMS is taken over. makes_again: the backward pass makes the results once more for linears that wait for them
    (`late_tensor.py`).

    Raises:
        ValueError: a weight, bias or branch whose shape does not fit x.
    """
    width = x.shape[-1]
    for branch in branches:
        if branch is not None and branch.shape != x.shape:
            raise ValueError(f"cannot add {list(branch.shape)} to x {list(x.shape)}; both must be of one shape")
    for affine in affines:
        if affine is not None and (affine.numel() != 1 if kind == "scale" else affine.shape != (width,)):
            wanted = "one number" if kind == "scale" else f"[{width}]"
            raise ValueError(f"x {list(x.shape)} was given a weight or bias {list(affine.shape)}; {wanted} is wanted")
    affines = (*affines, None, None, None)[:4]
    late = late_tensors(1 + (affines[2] is not None), x) if makes_again else ()
    outputs = _RowNorm.apply(x, *branches, *affines, float(eps), kind, measured or width, passes_on, late)
    return *outputs[: len(outputs) - len(late)], *map(mark, outputs[len(outputs) - len(late) :], late)
