"""Any cut of a tensor fills any other cut of it."""

import random
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from neox_hf.checkpoint.box_files import BoxFiles, pack_boxes
from neox_hf.checkpoint.boxes import Box, SavedBox, check_boxes, fill_boxes, intersect
from neox_hf.checkpoint.tensor_file import write_tensors
from neox_hf.errors import CheckpointError


class MemoryBoxes:
    """A `BoxReader` over boxes in memory."""

    def __init__(self, boxes: list[Box]) -> None:
        self.tensors = [box.tensor for box in boxes]
        self.boxes = defaultdict(list)
        for number, box in enumerate(boxes):
            saved = SavedBox(
                box.name, box.offsets, box.extent, box.shape, box.tensor.dtype, f"file {number}", str(number)
            )
            self.boxes[box.name].append(saved)

    def find(self, name: str) -> list[SavedBox]:
        return self.boxes.get(name, [])

    def read(self, box: SavedBox, region: tuple[slice, ...]) -> Tensor:
        return self.tensors[int(box.key)][region]


def cut(name: str, tensor: Tensor, offsets: tuple[int, ...], shape: tuple[int, ...], pick: random.Random) -> list[Box]:
    """Cut a tensor at random, again and again, in any dimension."""
    dimensions = [d for d, n in enumerate(tensor.shape) if n > 1]
    if not dimensions or pick.random() < 0.3:
        return [Box(name, offsets, shape, tensor)]
    d = pick.choice(dimensions)
    at = pick.randrange(1, tensor.shape[d])
    low, high = tensor.split([at, tensor.shape[d] - at], dim=d)
    shifted = (*offsets[:d], offsets[d] + at, *offsets[d + 1 :])
    return [*cut(name, low, offsets, shape, pick), *cut(name, high, shifted, shape, pick)]


def cuts_of(tensors: dict[str, Tensor], pick: random.Random) -> list[Box]:
    boxes = [
        box
        for name, tensor in tensors.items()
        for box in cut(name, tensor, (0,) * tensor.ndim, tuple(tensor.shape), pick)
    ]
    pick.shuffle(boxes)
    return boxes


@pytest.mark.parametrize("seed", range(30))
def test_any_cut_fills_any_other(seed):
    pick = random.Random(seed)
    tensors = {
        "vector": torch.randn(11),
        "matrix": torch.randn(7, 5),
        "cube": torch.randn(3, 4, 5),
        "dot": torch.randn(()),
    }
    saved = cuts_of(tensors, pick)
    empty = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    fill_boxes(cuts_of(empty, pick), MemoryBoxes(saved))
    assert all(torch.equal(empty[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("shape", [(), (11,), (7, 5), (3, 4, 5)], ids=str)
def test_an_element_that_is_saved_twice_is_found_wherever_it_lies(seed, shape):
    pick = random.Random(seed)
    whole = torch.randn(shape)
    saved = cut("w", whole, (0,) * len(shape), shape, pick)
    again = tuple(pick.randrange(n) for n in shape)
    saved.append(Box("w", again, shape, whole[tuple(slice(i, i + 1) for i in again)]))
    pick.shuffle(saved)
    with pytest.raises(CheckpointError, match="w is saved twice"):
        check_boxes([Box.whole("w", whole)], MemoryBoxes(saved))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_any_cut_survives_the_files_of_several_ranks(tmp_path: Path, seed, dtype):
    pick = random.Random(seed)
    tensors = {"matrix": torch.randn(7, 5).to(dtype), "dot": torch.randn(()).to(dtype)}
    saved = cuts_of(tensors, pick)
    paths = [tmp_path / f"rank{rank}.safetensors" for rank in range(3)]
    for rank, path in enumerate(paths):
        write_tensors(path, *pack_boxes(saved[rank::3]))
    empty = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    reader = BoxFiles(paths)
    fill_boxes(cuts_of(empty, pick), reader)
    assert reader.names() == set(tensors)
    assert all(torch.equal(empty[name], tensors[name]) for name in tensors)


def test_intersection_is_where_both_have_elements():
    zeros = torch.zeros
    a, b = Box("t", (0, 2), (9, 9), zeros(4, 4)), Box("t", (3, 0), (9, 9), zeros(5, 3))
    assert intersect(a, b) == ((3, 2), (1, 1))
    assert intersect(a, Box("t", (4, 2), (9, 9), zeros(1, 1))) is None


WHOLE = Box.whole("w", torch.ones(4, 2))


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([], "w is not in the checkpoint"),
        ([Box.whole("w", torch.ones(4, 3))], r"w has shape \(4, 3\) in the checkpoint \(file 0\) and \(4, 2\)"),
        (
            [Box.whole("w", torch.ones(4, 2).half())],
            r"w is torch.float16 in the checkpoint .* torch.float32 in this run",
        ),
        ([WHOLE, Box("w", (3, 0), (4, 2), torch.ones(1, 1))], "w is saved twice: in file 0 and in file 1"),
        ([Box("w", (1, 0), (4, 2), torch.ones(3, 2))], r"holds 6 of the 8 elements wanted from \(0, 0\)"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(saved, message):
    good, target = torch.zeros(2), torch.zeros(4, 2)
    reader = MemoryBoxes([*saved, Box.whole("good", torch.ones(2))])
    with pytest.raises(CheckpointError, match=message):
        fill_boxes([Box.whole("good", good), Box.whole("w", target)], reader)
    assert not good.any()
    assert not target.any()


def test_empty_and_dimensionless_tensors_are_boxes():
    target = torch.zeros(())
    saved = [Box.whole("none", torch.ones(0, 3)), Box.whole("dot", torch.ones(()))]
    fill_boxes([Box.whole("none", torch.zeros(0, 3)), Box.whole("dot", target)], MemoryBoxes(saved))
    assert target == 1
    check_boxes([], MemoryBoxes([]))
