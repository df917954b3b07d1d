"""A linear whose result goes through GELU.

    z = x weight^T        y = gelu(z + bias)

Shapes: x [..., in], weight [out, in], bias [out]; returns y [..., out]. Kept for the backward pass are x and z.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from neox_hf.kernels.autocast import autocast_dtype
from neox_hf.kernels.bias_gelu import BIAS_GELU, GeluForm, bias_gelu, bias_gelu_backward, check_form
from neox_hf.kernels.gelu_product import gelu_product
from neox_hf.kernels.gradient_dtype import gradient_dtype
from neox_hf.kernels.late_tensor import LateTensor, late_form, late_tensors, mark
from neox_hf.kernels.linear import linear
from neox_hf.kernels.once_differentiable import once_differentiable
from neox_hf.kernels.product import linear_product
from neox_hf.kernels.selective_checkpoint import selective_mode
from neox_hf.kernels.weight_gradient import AddProduct, adder_of, gradient_or_sum


class _Settings(NamedTuple):
    """add: what takes the weight's gradient. late_x, late_y: what stands for x, and for y, if it is made again."""

    form: str
    add: AddProduct | None
    late_x: LateTensor | None
    late_y: LateTensor | None
    backend: str


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, settings: _Settings) -> Tensor:
        z, y = gelu_product(x, weight, bias, settings.form, settings.backend)
        ctx.settings = settings
        ctx.sum_dtype = gradient_dtype(bias) if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(None if settings.late_x else x, z, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight, bias = ctx.saved_tensors
        form, add, late_x, late_y, backend = ctx.settings
        awaited = late_y is not None and late_y.is_awaited
        dz, dbias, y = bias_gelu_backward(dy, z, bias, form, ctx.sum_dtype, awaited)
        if awaited:
            late_y.arrive(y)
        dx = linear_product(dz, weight.t(), backend=backend) if ctx.needs_input_grad[0] else None
        dweight = gradient_or_sum(add, dz, x, ctx.needs_input_grad[1], late=late_x, backend=backend)
        return dx, dweight, None if ctx.sum_dtype is None else dbias, None


def goes_on(x: Tensor, backend: str) -> bool:
    """Whether a product of x may go on with GELU: there is a kernel for that, and nothing watches what is in between.

    A compiler sees more than it would of an autograd function, and selective checkpointing keeps the product alone.
    """
    watched = torch.compiler.is_compiling() or selective_mode() is not None
    return not watched and autocast_dtype(x.device) in (None, x.dtype) and BIAS_GELU.has_kernel_for(backend, x)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, form: GeluForm, *, makes_again: bool = False, backend: str = "auto"
) -> Tensor:
    """gelu(x weight^T + bias). makes_again: as `bias_gelu`'s. backend: of both the product and the kernel.

    Raises:
        ValueError: the form is neither erf nor tanh, or x, weight and bias do not fit.
    """
    check_form(form)
    if x.shape[-1:] != weight.shape[1:] or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_gelu was given x {list(x.shape)}, a weight {list(weight.shape)} and a bias {list(bias.shape)}; it "
            "wants [..., in], [out, in] and [out]"
        )
    alike = x.dtype == weight.dtype == bias.dtype
    if not alike or not goes_on(x, backend):
        return bias_gelu(linear(x, weight, backend=backend), bias, form, makes_again=makes_again, backend=backend)
    add = adder_of(weight, backend) if x.requires_grad else None
    late_y = late_tensors(1, x) if makes_again else ()
    late_x = late_form(x) if add is not None else None
    settings = _Settings(form, add, late_x, late_y[0] if late_y else None, backend)
    y = _LinearGelu.apply(x, weight if add is None else weight.detach(), bias, settings)
    return mark(y, late_y[0]) if late_y else y
