"""A linear whose weight may have its gradients summed by the product that makes them.

    y = x weight^T + bias
    dx = dy weight        dweight += dy^T x        dbias = sum over tokens of dy

Shapes: x [..., in], weight [out, in], bias [out] or None; returns [..., out].
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from neox_hf.kernels.late_tensor import LateTensor, late_form
from neox_hf.kernels.weight_gradient import GradientSum, sum_of


class _SummingLinear(torch.autograd.Function):
    """Gives the gradients of x and the bias to autograd, and that of the weight to its `GradientSum`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, total: GradientSum, late: LateTensor | None
    ) -> Tensor:
        ctx.total, ctx.late = total, late
        ctx.save_for_backward(weight, None if late else x)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight, x), total = ctx.saved_tensors, ctx.total
        tokens = gradient.flatten(0, -2)
        for_x = gradient @ weight if ctx.needs_input_grad[0] else None
        if ctx.late is None:
            total.add_product(weight, tokens, x.flatten(0, -2))
        else:
            ctx.late.when_there(lambda again: total.add_product(weight, tokens, again.flatten(0, -2)))
        return for_x, None, tokens.sum(0) if ctx.needs_input_grad[2] else None, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, as `F.linear`; a weight that carries a `GradientSum` has its gradient added there.

    Of an x that is made again in the backward pass (`late_tensor.py`) nothing is kept then.
    """
    total = sum_of(weight)
    if total is None or not weight.requires_grad or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    return _SummingLinear.apply(x, weight, bias, total, late_form(x))
