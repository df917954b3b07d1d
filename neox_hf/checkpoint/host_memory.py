"""Host memory for the copies that a checkpoint is written from, kept from one checkpoint to the next.

An allocator gives large tensors back to the system, which then has to clear every page of the next ones, and that takes
longer than to copy into them. Memory that is kept is cleared once in a run.
"""

import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 28
"""Of what is asked of the system at once, for many tensors; a larger tensor has a block of its own."""

ALIGNMENT = 64
"""Bytes that a tensor begins at a multiple of: what any dtype wants, and the width of a line of the cache."""


@dataclass
class _Block:
    content: Tensor
    used: int = 0

    def has_room(self, size: int) -> bool:
        return self.used + size <= self.content.numel()


class HostMemory:
    """Gives out tensors that all are in use until `clear`; then the next ones lie where they did."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return sum(block.content.numel() for block in self._blocks)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor on any device."""
        return self.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)

    def empty(self, shape: Iterable[int], *, dtype: torch.dtype) -> Tensor:
        """As `torch.empty`."""
        shape = tuple(shape)
        size = math.prod(shape) * dtype.itemsize
        taken = -(-size // ALIGNMENT) * ALIGNMENT
        block = next((block for block in self._blocks if block.has_room(taken)), None)
        if block is None:
            block = _Block(_memory(max(taken, BLOCK_BYTES)))
            self._blocks.append(block)
        content = block.content.narrow(0, block.used, size)
        block.used += taken
        return content.view(dtype).view(shape)

    def clear(self) -> None:
        """Nobody may read what has been given out any more."""
        for block in self._blocks:
            block.used = 0


def _memory(size: int) -> Tensor:
    """Bytes of this process alone: pages shared with a child, as a loader's worker is, would have to be copied before
    they are written again."""
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_DONTFORK"):  # Linux has it
        region.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(region, dtype=torch.uint8)
