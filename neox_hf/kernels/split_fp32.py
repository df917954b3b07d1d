"""An fp32 number in two halves of 16 bits: the bf16 number that it rounds to, and what that one is short of it.

    bits(x) = (bits(high) << 16) + remainder          -32768 <= remainder < 32768

Beside bf16 weights, fp32 masters hold the upper half of every number a second time. Remainders alone make the same
masters of the weights, in half the memory, and a step need not write the weights besides.

One number in 131,072 is kept as its neighbour: that half way to the next bf16 number, where rounding to even goes down;
its remainder would be 32768. The neighbour is one unit of fp32 nearer to `high`, and rounds to it, too.

A half may be written to by itself, a weight that is set. Nothing lies below zero's magnitude, so beside 0, as no number
is split, a negative remainder counts as 0.
"""

import torch
from torch import Tensor

from neox_hf.kernels.language import tl, triton

LARGEST = 0x7FFF
"""Of remainders; also what rounding to nearest adds before it cuts off."""

MOST = tl.constexpr(LARGEST)

MAGNITUDE = tl.constexpr(0x7FFF)
"""The bits of an upper half that are not its sign."""

A_NAN = tl.constexpr(0x7FC0)
"""The upper half of one."""


def split_fp32(x: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 and int16, of the shape of x."""
    high = x.to(torch.bfloat16)
    remainder = x.view(torch.int32) - _upper_half(high)
    return high, remainder.clamp_(max=LARGEST).to(torch.int16)


def join_fp32(high: Tensor, remainder: Tensor) -> Tensor:
    """fp32, of the shape of both."""
    remainder = torch.where(high == 0, remainder.clamp(min=0), remainder)
    return (_upper_half(high) + remainder).view(torch.float32)


def _upper_half(high: Tensor) -> Tensor:
    return high.view(torch.int16).to(torch.int32) << 16


@triton.jit
def joined(high, remainder):
    """`join_fp32` of two blocks of int16."""
    remainder = tl.where((high & MAGNITUDE) == 0, tl.maximum(remainder, 0), remainder)
    return ((high.to(tl.int32) << 16) + remainder.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def halves(x):
    """`split_fp32` of a block, as two of int16. In integers: the interpreter would cut bf16 off."""
    bits = x.to(tl.int32, bitcast=True)
    high = tl.where(x == x, (bits + MOST + ((bits >> 16) & 1)) >> 16, A_NAN)
    return high.to(tl.int16), tl.minimum(bits - (high << 16), MOST).to(tl.int16)
