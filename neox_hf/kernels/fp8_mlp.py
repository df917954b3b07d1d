"""The feed-forward half of a block in eight bits, as one node of the graph: what lies between is never half precision
but where a product writes it.

    z = x up^T        y = gelu(z + up_bias)        out = y down^T + down_bias

Shapes: x [..., H], up [F, H], down [H, F], biases [F] and [H] or None; returns [..., H].

Kept for the backward pass: x in eight bits, transposed, and z. y is made again there, on the way (`fp8_gelu`).
"""

from typing import Any

import torch
from torch import Tensor

from neox_hf.kernels.fp8_cast import fp8_cast
from neox_hf.kernels.fp8_format import Fp8Tensor
from neox_hf.kernels.fp8_gelu import gelu_backward_to_fp8, gelu_to_fp8
from neox_hf.kernels.fp8_gradient import cast_gradient
from neox_hf.kernels.fp8_linear import Fp8Linear, GradientTaker, check_fits
from neox_hf.kernels.fp8_product import fp8_product
from neox_hf.kernels.gradient_dtype import gradient_dtype
from neox_hf.kernels.once_differentiable import once_differentiable


class _Fp8Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        _: Tensor,
        up_bias: Tensor | None,
        __: Tensor,
        down_bias: Tensor | None,
        form: str,
        takers: tuple[GradientTaker, GradientTaker],
        states: tuple[Fp8Linear, Fp8Linear],
    ) -> Tensor:
        (first, second), (up, down), backend = states, takers, states[0].backend
        x8, _ = fp8_cast(x.flatten(0, -2), first.input, columns=up.wanted, backend=backend)
        up8, down8 = first.weight.of(up.weight), second.weight.of(down.weight)
        z = fp8_product(x8.rows, up8.rows, x8.inverse, up8.inverse, x.dtype, fast=True)
        y8 = gelu_to_fp8(z, up_bias, form, second.input, backend=backend)
        out = fp8_product(y8.rows, down8.rows, y8.inverse, down8.inverse, x.dtype, bias=down_bias, fast=True)
        ctx.form, ctx.takers, ctx.states = form, takers, states
        biases, wanted = (up_bias, down_bias), (ctx.needs_input_grad[2], ctx.needs_input_grad[4])
        ctx.sum_dtypes = [gradient_dtype(bias) if wants else None for bias, wants in zip(biases, wanted, strict=True)]
        ctx.save_for_backward(
            x8.columns, x8.inverse, z, up_bias, up8.columns, up8.inverse, down8.columns, down8.inverse
        )
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        columns, inverse, z, up_bias, up_columns, up_inverse, down_columns, down_inverse = ctx.saved_tensors
        (first, second), (up, down), backend = ctx.states, ctx.takers, ctx.states[0].backend
        dout8, ddown_bias = cast_gradient(
            dout, second.gradient, rows=True, columns=down.wanted, sum_dtype=ctx.sum_dtypes[1], backend=backend
        )
        dy = fp8_product(dout8.rows, down_columns, dout8.inverse, down_inverse, dout.dtype)
        dz8, y8, dup_bias = gelu_backward_to_fp8(
            dy, z, up_bias, ctx.form, first.gradient, second.input, ctx.sum_dtypes[0], backend=backend
        )
        ddown = down.take(dout8, y8)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = fp8_product(dz8.rows, up_columns, dz8.inverse, up_inverse, dout.dtype)
            dx = dx.view(*dout.shape[:-1], dx.shape[-1])
        dup = up.take(dz8, Fp8Tensor(None, columns, inverse))
        return dx, dup, dup_bias, ddown, ddown_bias, None, None, None


@torch.compiler.disable  # what is remembered from step to step is no part of a graph
def fp8_mlp(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    form: str,
    states: tuple[Fp8Linear, Fp8Linear],
) -> Tensor:
    """gelu(x up^T + up_bias) down^T + down_bias; form: `erf` or `tanh`; states: of up and of down.

    Raises:
        ValueError: a side of a weight is no multiple of 16, or x or `down` does not fit `up`.
    """
    check_fits(x, up)
    if down.shape[1] != up.shape[0]:
        raise ValueError(
            f"an fp8 feed-forward layer was given up {list(up.shape)} and down {list(down.shape)}: [F, H], [H, F]"
        )
    check_fits(up.t(), down)
    takers = GradientTaker.of(up, x), GradientTaker.of(down, x)
    operands = [taker.operand for taker in takers]
    return _Fp8Mlp.apply(x, operands[0], up_bias, operands[1], down_bias, form, takers, states)
