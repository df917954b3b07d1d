"""The feed-forward half of a block with the sum that closes it, as one node of the graph.

    z = x up^T        y = gelu(z + up_bias)        out = stream + branch + y down^T + branch_bias + down_bias

Shapes: x, stream and branch [..., H], up [F, H], down [H, F], up_bias [F], the other biases [H]; returns [..., H].

As one node, because what comes before an element of it is written may be the last step of a product on either side:
GELU behind `up`, the sum behind `down`, and GELU's backward pass behind the product with `down` (`gelu_product.py`,
`residual_product.py`). Kept for the backward pass are x, unless it is made again (`late_tensor.py`), z, and y unless
`makes_again`. Gradients of the matrices go where they are summed, as `linear`'s do, or to autograd.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from neox_hf.kernels.bias_dropout_residual import bias_gradients
from neox_hf.kernels.gelu_product import gelu_product, gelu_product_backward
from neox_hf.kernels.gradient_dtype import gradient_dtype
from neox_hf.kernels.late_tensor import LateTensor, late_form
from neox_hf.kernels.once_differentiable import once_differentiable
from neox_hf.kernels.product import linear_product
from neox_hf.kernels.residual_product import residual_product
from neox_hf.kernels.weight_gradient import AddProduct, adder_of, gradient_or_sum


class MlpWeights(NamedTuple):
    """Parameters. down_bias and branch_bias: what the two branches still lack."""

    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor
    branch_bias: Tensor


class _Settings(NamedTuple):
    form: str
    makes_again: bool
    late: LateTensor | None
    adders: tuple[AddProduct | None, AddProduct | None]
    backend: str


class _ResidualMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        stream: Tensor,
        branch: Tensor,
        up: Tensor,
        up_bias: Tensor,
        down: Tensor,
        down_bias: Tensor,
        branch_bias: Tensor,
        settings: _Settings,
    ) -> Tensor:
        z, y = gelu_product(x, up, up_bias, settings.form, settings.backend)
        out = residual_product(y, down, stream, branch, branch_bias, down_bias, settings.backend)
        ctx.settings = settings
        biases, wanted = (up_bias, down_bias, branch_bias), (ctx.needs_input_grad[place] for place in (4, 6, 7))
        ctx.sum_dtypes = [gradient_dtype(bias) if wants else None for bias, wants in zip(biases, wanted, strict=True)]
        kept_x, kept_y = None if settings.late else x, None if settings.makes_again else y
        ctx.save_for_backward(kept_x, z, kept_y, up, up_bias, down)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, z, y, up, up_bias, down = ctx.saved_tensors
        settings, (add_up, add_down) = ctx.settings, ctx.settings.adders
        up_dtype, down_dtype, branch_dtype = ctx.sum_dtypes
        form, backend = settings.form, settings.backend
        dz, dup_bias, again = gelu_product_backward(dout, down, z, up_bias, form, up_dtype, y is None, backend)
        _, _, _, wants_up, _, wants_down, *_ = ctx.needs_input_grad
        ddown = gradient_or_sum(add_down, dout, again if y is None else y, wants_down, backend=backend)
        dx = linear_product(dz, up.t(), backend=backend)
        dup = gradient_or_sum(add_up, dz, x, wants_up, late=settings.late, backend=backend)
        dbranch_bias, ddown_bias = bias_gradients(dout, branch_dtype, down_dtype)
        dup_bias = None if up_dtype is None else dup_bias
        return dx, dout, dout, dup, dup_bias, ddown, ddown_bias, dbranch_bias, None


def residual_mlp(
    x: Tensor,
    stream: Tensor,
    branch: Tensor,
    weights: MlpWeights,
    form: str,
    *,
    makes_again: bool = False,
    backend: str = "auto",
) -> Tensor:
    """stream + branch + the feed-forward half of x, and both branches' biases. x needs a gradient.

    form: `erf` or `tanh`. makes_again: y is made again rather than kept.
    backend: of `product_`; the kernels around the products are Triton's whatever it is.
    """
    up, up_bias, down, down_bias, branch_bias = weights
    assert x.requires_grad, "nothing is sure to run the backward pass that sums the matrices' gradients"
    adders = adder_of(up, backend), adder_of(down, backend)
    late = late_form(x) if adders[0] else None
    settings = _Settings(form, makes_again, late, adders, backend)
    up, down = (each.detach() if add else each for each, add in zip((up, down), adders, strict=True))
    operands = up, up_bias, down, down_bias, branch_bias
    return _ResidualMlp.apply(x, stream, branch, *operands, settings)
