"""Fragments: consecutive elements of a flattened tensor, which is how replicas and ZeRO deal out a parameter.

On disk a fragment is boxes: of a matrix at most three, the rest of a row, whole rows, and the beginning of a row.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from neox_hf.checkpoint.boxes import Box
from neox_hf.parallel.shards import Shard

Shape = tuple[int, ...]
Maker = Callable[[int, int], Tensor]
"""Makes consecutive elements of a fragment, given the first and how many: flat, on any device."""


@dataclass(frozen=True)
class Fragment:
    """Where a fragment lies: in a local tensor of `shape` (this rank's tensor shard of it, padding included), from the
    element `start` on."""

    name: str
    shape: Shape
    shard: Shard | None = None
    start: int = 0

    def boxes(self, elements: Tensor, make: Maker | None = None) -> Iterator[Box]:
        """The boxes of those elements that exist on disk: none of padding.

        elements: of the fragment, flat; the boxes are views of them. make: where they are on `meta`, what makes some.
        """
        at = 0
        for offsets, extent in blocks(self.shape, self.start, self.start + elements.numel()):
            numel = math.prod(extent)
            box = self._box(offsets, elements.narrow(0, at, numel).view(extent))
            if box is not None:
                made = None if make is None else partial(self._made, offsets, extent, partial(make, at, numel))
                yield replace(box, make=made)
            at += numel

    def whole(self, local: Tensor) -> Iterator[Box]:
        """The box of all of the local tensor that is no padding, if there is any, whatever its strides."""
        box = self._box((0,) * local.ndim, local)
        if box is not None:
            yield box

    def _box(self, offsets: Shape, block: Tensor) -> Box | None:
        """Of a block of the local tensor."""
        if self.shard is None:
            return Box(self.name, offsets, self.shape, block)
        dim = self.shard.dim
        real = min(block.shape[dim], self.shard.length - offsets[dim])
        if real <= 0:
            return None
        corner = tuple(at + self.shard.start if d == dim else at for d, at in enumerate(offsets))
        return Box(self.name, corner, self.shard.shape, block.narrow(dim, 0, real))

    def _made(self, offsets: Shape, extent: Shape, make: Callable[[], Tensor]) -> Tensor:
        box = self._box(offsets, make().view(extent))
        assert box is not None, "what is padding alone is not made"
        return box.tensor


def blocks(shape: Shape, start: int, end: int) -> Iterator[tuple[Shape, Shape]]:
    """The hyper-rectangles, corner and extent, that the elements from `start` to `end` of a flattened tensor are, in
    the order of the elements."""
    if start >= end:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, skipped = divmod(start, row)
    last, rest = divmod(end, row)
    if skipped:
        stop = min(end - first * row, row)
        yield from _in_row(shape, first, skipped, stop)
        first += 1
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if rest and first <= last:
        yield from _in_row(shape, last, 0, rest)


def _in_row(shape: Shape, row: int, start: int, end: int) -> Iterator[tuple[Shape, Shape]]:
    for offsets, extent in blocks(shape[1:], start, end):
        yield (row, *offsets), (1, *extent)
