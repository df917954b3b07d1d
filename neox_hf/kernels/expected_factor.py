"""Gradients that were made ahead of time, with the factor that the backward pass was expected to bring.

    gradient *= brought / expected

Where it brings what was expected, which is the rule, nothing is read but the two numbers, and nothing is rounded again.
Shapes: gradient of any shape, contiguous; brought and expected one number each, on its device, in fp32 (fp64 for fp64).
"""

import torch
from torch import Tensor

from neox_hf.kernels.devices import multiprocessors
from neox_hf.kernels.dispatch import Op
from neox_hf.kernels.language import tl, triton
from neox_hf.kernels.registration import register, register_fake

AS_EXPECTED = 1e-6
"""Relative difference of two ways to compute one number in fp32."""

BLOCK = 4096
PROGRAMS = 8
"""Programs for each multiprocessor."""


def quotient(brought: Tensor, expected: Tensor) -> Tensor:
    """brought / expected, and 1 where they are one number but for its rounding."""
    same = (brought == expected) | ((brought - expected).abs() <= AS_EXPECTED * expected.abs())
    return torch.where(same, torch.ones_like(brought), brought / expected)


def put_right_reference(gradient: Tensor, brought: Tensor, expected: Tensor) -> None:
    # Shaped: a factor without dimensions would first be rounded to the gradient's dtype.
    torch.mul(gradient, quotient(brought, expected).reshape((1,) * max(gradient.ndim, 1)), out=gradient)


@triton.jit
def _put_right_kernel(gradient, brought, expected, numel, SAME: tl.constexpr, BLOCK: tl.constexpr):
    came, wanted = tl.load(brought).to(tl.float32), tl.load(expected).to(tl.float32)
    same = (came == wanted) | (tl.abs(came - wanted) <= SAME * tl.abs(wanted))
    factor = tl.where(same, 1.0, came / wanted)
    if factor != 1.0:  # as NaN is, too
        for block in range(tl.program_id(0), tl.cdiv(numel, BLOCK), tl.num_programs(0)):
            place = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            values = tl.load(gradient + place, mask=place < numel).to(tl.float32) * factor
            tl.store(gradient + place, values.to(gradient.dtype.element_ty), mask=place < numel)


@register("put_right", mutates=("gradient",))
def put_right_triton(gradient: Tensor, brought: Tensor, expected: Tensor) -> None:
    assert gradient.is_contiguous(), "elements are taken in the order of memory"
    programs = min(-(-gradient.numel() // BLOCK), multiprocessors(gradient.device) * PROGRAMS)
    if programs:
        numel = gradient.numel()
        _put_right_kernel[(programs,)](gradient, brought, expected, numel, SAME=AS_EXPECTED, BLOCK=BLOCK, num_warps=8)


@register_fake(put_right_triton)
def _(gradient: Tensor, brought: Tensor, expected: Tensor) -> None:
    return None


PUT_RIGHT = Op("put_right", torch=put_right_reference, triton=put_right_triton)


def put_right_(gradient: Tensor, brought: Tensor, expected: Tensor, *, backend: str = "auto") -> None:
    """Make a gradient that holds the factor `expected` one that holds `brought`, in place."""
    PUT_RIGHT.choose(backend, gradient)(gradient, brought, expected)
