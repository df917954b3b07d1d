"""One cast for a gradient that several linears take.

Where the outputs of two linears are added, as both halves of a parallel block are to the stream, autograd sends both
the same tensor. The first to cast it leaves the result with it; the second has nothing to read or write.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neox_hf.kernels.fp8_cast import fp8_cast
from neox_hf.kernels.fp8_format import Fp8Tensor
from neox_hf.kernels.fp8_scales import ScaleSlot

ATTRIBUTE = "fp8_cast"


@dataclass(frozen=True)
class _Made:
    """A cast of one state of a tensor, and all that it was asked for with."""

    version: int
    asked: tuple[Any, ...]
    cast: Fp8Tensor
    sums: Tensor | None


def cast_gradient(
    gradient: Tensor, slot: ScaleSlot, *, rows: bool, columns: bool, sum_dtype: torch.dtype | None, backend: str
) -> tuple[Fp8Tensor, Tensor | None]:
    """`fp8_cast` of a gradient [..., C] as [T, C], or what another linear's cast of the same tensor gave.

    That has its own slot's scale: the same, but for what either slot saw when the two gradients were different ones.
    """
    asked = (rows, columns, sum_dtype, slot.dtype, slot.table.epoch, backend)
    made = getattr(gradient, ATTRIBUTE, None)
    if made is not None and made.version == gradient._version and made.asked == asked:
        # Each parameter's gradient is its own tensor, which may be added to where it is.
        return made.cast, None if made.sums is None else made.sums.clone()
    cast, sums = fp8_cast(
        gradient.flatten(0, -2), slot, rows=rows, columns=columns, sum_dtype=sum_dtype, backend=backend
    )
    setattr(gradient, ATTRIBUTE, _Made(gradient._version, asked, cast, None if sums is None else sums.clone()))
    return cast, sums
