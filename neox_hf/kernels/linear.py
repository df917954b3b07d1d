"""A linear whose weight may have its gradients summed by the product that makes them.

    y = x weight^T + bias
    dx = dy weight        dweight += dy^T x        dbias = sum over tokens of dy

Shapes: x [..., in], weight [out, in], bias [out] or None; returns [..., out].
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neox_hf.kernels.late_tensor import LateTensor, late_form
from neox_hf.kernels.once_differentiable import once_differentiable
from neox_hf.kernels.product import is_chosen, linear_product
from neox_hf.kernels.weight_gradient import AddProduct, adder_of, gradient_or_sum


class _SummingLinear(torch.autograd.Function):
    """Gives the gradients of x and the bias to autograd, and the product that is the weight's to `add`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        add: AddProduct,
        late: LateTensor | None,
        backend: str,
    ) -> Tensor:
        ctx.add, ctx.late, ctx.backend = add, late, backend
        ctx.save_for_backward(weight, None if late else x)
        return linear_product(x, weight, bias, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, x = ctx.saved_tensors
        for_x = linear_product(gradient, weight.t(), backend=ctx.backend)
        gradient_or_sum(ctx.add, gradient, x, False, late=ctx.late)
        for_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return for_x, None, for_bias, None, None, None


class _ChoosingLinear(torch.autograd.Function):
    """What autograd makes of a linear, but for who computes its products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return linear_product(x, weight, bias, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (wants_x, wants_weight, wants_bias, _) = ctx.saved_tensors, ctx.needs_input_grad
        for_x = linear_product(gradient, weight.t(), backend=ctx.backend) if wants_x else None
        for_weight = gradient_or_sum(None, gradient, x, wants_weight, backend=ctx.backend)
        return for_x, for_weight, gradient.flatten(0, -2).sum(0) if wants_bias else None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """x weight^T + bias, as `F.linear`; a weight that carries a `GradientSum` has its gradient added there.

    Of an x that is made again in the backward pass (`late_tensor.py`) nothing is kept then. backend: of `product_`.
    """
    add = adder_of(weight, backend)
    if add is None or not x.requires_grad:
        trains = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if trains and is_chosen(backend, x, weight.t()):
            return _ChoosingLinear.apply(x, weight, bias, backend)
        return F.linear(x, weight, bias)
    return _SummingLinear.apply(x, weight.detach(), bias, add, late_form(x), backend)
