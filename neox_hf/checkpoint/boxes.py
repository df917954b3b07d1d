"""The unit of saving: a box, a hyper-rectangle of one tensor under its Hugging Face name.

A tensor that is whole in memory is one box, a tensor shard is one too, and what ZeRO deals out is a few (`fragments`).
Loading intersects the boxes that are wanted with the boxes that were saved, so the layout that saves and the layout
that loads need not agree.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from neox_hf.errors import CheckpointError


@dataclass(frozen=True, eq=False)
class Box:
    """Part of the tensor `name`: it begins at `offsets` and is as large as `tensor`. `shape` is the whole tensor's.

    make: where `tensor` is on `meta`, what makes it, to be written.
    """

    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    tensor: Tensor
    make: Callable[[], Tensor] | None = None

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> "Box":
        """The box that is all of the tensor."""
        return cls(name, (0,) * tensor.ndim, tuple(tensor.shape), tensor)

    @property
    def extent(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


@dataclass(frozen=True)
class SavedBox:
    """A box on disk. `file` and `key` say where its elements are; `extent` is its own size, `shape` the tensor's."""

    name: str
    offsets: tuple[int, ...]
    extent: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    key: str


class BoxReader(Protocol):
    """A set of saved boxes."""

    def find(self, name: str) -> list[SavedBox]:
        """The saved boxes of one tensor; none if the name is unknown."""

    def read(self, box: SavedBox, region: tuple[slice, ...]) -> Tensor:
        """The elements of `region`, counted from the box's own corner."""


Corner = tuple[int, ...]


def intersect(a: Box | SavedBox, b: Box | SavedBox) -> tuple[Corner, Corner] | None:
    """First corner and extent of what two boxes of one tensor share, or None when they share no element."""
    first = tuple(max(i, j) for i, j in zip(a.offsets, b.offsets, strict=True))
    ends = zip(a.offsets, a.extent, b.offsets, b.extent, strict=True)
    last = tuple(min(i + n, j + m) for i, n, j, m in ends)
    extent = tuple(end - start for start, end in zip(first, last, strict=True))
    return (first, extent) if all(n > 0 for n in extent) else None


def check_boxes(wanted: Iterable[Box], saved: BoxReader) -> None:
    """Make sure that `saved` holds every element of every wanted box, with the same shape and dtype.

    Raises:
        CheckpointError: names the first tensor that is missing, differs, or is saved twice or only in part.
    """
    for box in wanted:
        parts = saved.find(box.name)
        if not parts:
            raise CheckpointError(
                f"{box.name} is not in the checkpoint; the run and the checkpoint differ in the model"
            )
        for part in parts:
            _check_alike(box, part)
        shared = {part: common[1] for part in parts if (common := intersect(box, part))}
        for one, other in _overlaps(shared):
            raise CheckpointError(f"{box.name} is saved twice: in {one.file} and in {other.file}")
        held = sum(map(math.prod, shared.values()))
        if held != box.tensor.numel():
            raise CheckpointError(
                f"{box.name}: the checkpoint holds {held} of the {box.tensor.numel()} elements wanted from "
                f"{box.offsets}; a rank's file is missing, or belongs to another checkpoint"
            )


def fill_boxes(wanted: Iterable[Box], saved: BoxReader) -> None:
    """Copy the saved elements into the tensors of the wanted boxes, after all of them have been checked.

    Raises:
        CheckpointError: see `check_boxes`; nothing has been changed then.
    """
    wanted = list(wanted)
    check_boxes(wanted, saved)
    with torch.no_grad():
        for box in wanted:
            for part in saved.find(box.name):
                common = intersect(box, part)
                if common:
                    target = box.tensor[_region(box, *common)]
                    target.copy_(saved.read(part, _region(part, *common)))


def _overlaps(parts: Iterable[SavedBox]) -> Iterator[tuple[SavedBox, SavedBox]]:
    """Pairs that share elements. There may be hundreds of parts, so only those with rows in common are compared."""
    ordered = sorted(parts, key=lambda part: part.offsets)
    for at, one in enumerate(ordered):
        for other in ordered[at + 1 :]:
            if one.offsets and other.offsets[0] >= one.offsets[0] + one.extent[0]:
                break
            if intersect(one, other):
                yield one, other


def _region(box: Box | SavedBox, first: Corner, extent: Corner) -> tuple[slice, ...]:
    """A region given in the tensor's coordinates, as slices of the box."""
    starts = (i - offset for i, offset in zip(first, box.offsets, strict=True))
    return tuple(slice(start, start + n) for start, n in zip(starts, extent, strict=True))


def _check_alike(box: Box, part: SavedBox) -> None:
    if part.shape != box.shape:
        raise CheckpointError(
            f"{box.name} has shape {part.shape} in the checkpoint ({part.file}) and {box.shape} in this run; "
            "resume with the recipe's model section that wrote it"
        )
    if part.dtype != box.tensor.dtype:
        raise CheckpointError(
            f"{box.name} is {part.dtype} in the checkpoint ({part.file}) and {box.tensor.dtype} in this run; "
            "resume with the train.precision that wrote it"
        )
