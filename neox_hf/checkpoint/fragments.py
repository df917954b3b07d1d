"""Fragments: consecutive elements of a flattened tensor, which is how ZeRO deals a parameter to data ranks.

They are no boxes, so they never reach the disk: saving puts them together, and loading cuts them out of whole rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from neox_hf.checkpoint.boxes import Box
from neox_hf.parallel.shards import Shard

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """The rows of a local tensor (this rank's tensor shard of it, padding included) that hold one fragment.

    first, end: of the rows. skipped: elements of the first row that come before the fragment. numel: its elements.
    """

    name: str
    shape: Shape
    shard: Shard | None
    first: int
    end: int
    skipped: int
    numel: int

    @classmethod
    def holding(cls, name: str, shape: Shape, shard: Shard | None, start: int, numel: int) -> "Rows":
        """The rows of a local tensor of `shape` that hold `numel` elements from `start` on."""
        row = max(1, torch.Size(shape[1:]).numel())
        first, end = start // row, -(-(start + numel) // row)
        return cls(name, tuple(shape), shard, first, end, start - first * row, numel)

    def buffer(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """Zeros for these rows; padding stays zero."""
        shape = (self.end - self.first, *self.shape[1:]) if self.shape else ()
        return torch.zeros(shape, dtype=dtype, device=device)

    def box(self, buffer: Tensor) -> Box | None:
        """The box, in `buffer`, of the elements that exist on disk; None if all of the rows are padding."""
        if self.shard is None:
            offsets = (self.first, *(0 for _ in self.shape[1:])) if self.shape else ()
            return Box(self.name, offsets, self.shape, buffer)
        dim, offsets = self.shard.dim, list(self.shard.offsets)
        offsets[0] += self.first
        real = min(self.end, self.shard.length) - self.first if dim == 0 else self.shard.length
        if real <= 0:
            return None
        return Box(self.name, tuple(offsets), self.shard.shape, buffer.narrow(dim, 0, real))

    def fragment(self, buffer: Tensor) -> Tensor:
        """The fragment's elements, flat, out of the rows in `buffer`."""
        return buffer.reshape(-1).narrow(0, self.skipped, self.numel)


def whole_box(name: str, local: Tensor, shard: Shard | None) -> Box | None:
    """The box of all of a local tensor that is no padding; None if nothing is."""
    if shard is None:
        return Box.whole(name, local)
    return Box(name, shard.offsets, shard.shape, shard.real(local)) if shard.length else None
