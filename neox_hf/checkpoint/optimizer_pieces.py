"""Pieces: what a rank holds of one parameter's state, and which boxes on disk that is, for saving and loading alike."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from neox_hf.checkpoint.boxes import Box
from neox_hf.checkpoint.fragments import Fragment, Maker
from neox_hf.checkpoint.optimizer_containers import Cell, Place
from neox_hf.checkpoint.partitioned import whole_shape
from neox_hf.parallel.shards import Shard


@dataclass(frozen=True)
class Piece:
    """The elements of a parameter at `place` in `cell`.

    name: the parameter's, on disk. shard: which part of that this rank's parameter is; None: all.
    """

    name: str
    shard: Shard | None
    cell: Cell
    place: Place

    def boxes(self, value: Tensor, make: Maker | None = None) -> Iterator[Box]:
        """The boxes of a slot, which are views of it.

        value: of the whole cell. make: where that is on `meta`, what makes some of the cell's elements.
        """
        if self.cell.whole:
            alike = value.shape == self.cell.key.shape  # what has another shape than the parameter is no shard
            fragment = Fragment(self.name, tuple(value.shape), self.shard if alike else None)
            yield from fragment.whole(value) if make is None else fragment.boxes(value.reshape(-1), make)
            return
        at = self.place.at
        fragment = Fragment(self.name, whole_shape(self.place.parameter), self.shard, self.place.start)
        mine = value.detach().view(-1).narrow(0, at, self.place.numel)
        yield from fragment.boxes(mine, None if make is None else lambda first, numel: make(at + first, numel))
