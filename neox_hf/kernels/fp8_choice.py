"""Whom `auto` has round to eight bits.

On an H200 (torch 2.11 for CUDA 13.0, Triton 3.6) `fp8_cast`'s kernel wrote wrong transposed copies, every time and in
every dtype, of whole tiles of [4096, 2048]; its copies as they are were right, and so are both in Triton's interpreter.
The cause is ptxas 12.8, which Triton brings (triton-lang/triton#11111): where the two numbers of a conversion were
packed into a word of a row and were also taken apart for the transposed copy, it made these of a register that nothing
had written. `to_words` leaves it no such place, and in what ptxas makes of it every word is two conversions of its own;
but that has been read, not run. A transposed copy is a factor of every weight's gradient, so until a GPU has shown its
bytes to be those of the reference (`tests/kernels/test_fp8_gpu.py`), training does not take the kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neox_hf.kernels.dispatch import Op

KERNELS_ARE_RIGHT_ON_CUDA = False
"""What a GPU has shown. Where it is False, `auto` takes the references, and `triton` is for tests alone."""


@dataclass(frozen=True)
class Fp8Op(Op):
    """An op that rounds to eight bits."""

    def choose(self, backend: str, x: Tensor) -> Callable[..., Any]:
        """As `Op.choose`, but that `auto` waits for what a GPU has shown."""
        return super().choose("torch" if backend == "auto" and not KERNELS_ARE_RIGHT_ON_CUDA else backend, x)


def reason_against_kernels(backend: str, device: torch.device) -> str | None:
    """Why nothing is to be trained in eight bits with `backend` on `device`; None if it may be."""
    if backend != "triton" or device.type != "cuda" or KERNELS_ARE_RIGHT_ON_CUDA:
        return None
    return "kernels='triton', but the transposed copies of its kernels were wrong on a GPU; use kernels='auto'"


def how_it_is_rounded(backend: str, device: torch.device) -> str:
    """For the log, after a comma; empty where it is as it should be."""
    if device.type != "cuda":
        return f", by torch's arithmetic, which is slow: {device.type} has no such products"
    if backend == "auto" and not KERNELS_ARE_RIGHT_ON_CUDA:
        return ", rounded by torch's ops, which is slow: the kernels' transposed copies were wrong on a GPU"
    return ""
