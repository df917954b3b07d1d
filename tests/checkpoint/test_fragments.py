"""Consecutive elements of a tensor are few boxes, which hold all of them that exist on disk and nothing else."""

import math
import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from neox_hf.checkpoint.fragments import Fragment, blocks
from neox_hf.parallel.shards import Shard

SHAPES = [(), (1,), (11,), (7, 5), (1, 9), (6, 1), (3, 4, 5), (2, 1, 3, 2)]


def region(offsets: tuple[int, ...], extent: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(start, start + n) for start, n in zip(offsets, extent, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_are_the_elements_in_their_order(shape):
    whole = torch.arange(math.prod(shape)).view(shape)
    for start in range(whole.numel() + 1):
        for end in range(start, whole.numel() + 1):
            found = [whole[region(offsets, extent)] for offsets, extent in blocks(shape, start, end)]
            assert [n for block in found for n in block.flatten().tolist()] == list(range(start, end))
            assert len(found) <= max(1, 2 * len(shape) - 1)


def test_a_part_of_whole_rows_is_one_box():
    (box,) = Fragment("w", (8, 5), start=20).boxes(torch.zeros(20))
    assert (box.offsets, box.extent, box.shape) == ((4, 0), (4, 5), (8, 5))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dim", [0, 1])
def test_fragments_of_all_shards_write_every_element_once_and_no_padding(seed, dim):
    pick = random.Random(seed)
    shape, ranks = (7, 6) if dim else (7, 4), 2
    whole, written = torch.randn(shape), torch.zeros(shape, dtype=torch.int)
    copy = torch.zeros_like(whole)
    for rank in range(ranks):
        shard = Shard.of_rank(dim, shape, rank, ranks, padded=10)
        local = padded_share(whole, shard, 10 // ranks)
        cuts = sorted({0, local.numel(), *(pick.randrange(local.numel()) for _ in range(3))})
        for start, end in pairwise(cuts):
            fragment = Fragment("w", tuple(local.shape), shard, start)
            for box in fragment.boxes(local.flatten()[start:end]):
                assert box.shape == shape
                copy[region(box.offsets, box.extent)] = box.tensor
                written[region(box.offsets, box.extent)] += 1
    assert torch.equal(copy, whole)
    assert (written == 1).all()


def padded_share(whole: Tensor, shard: Shard, rows: int) -> Tensor:
    """A rank's share of `whole`, with NaN for padding."""
    shape = list(whole.shape)
    shape[shard.dim] = rows
    local = torch.full(shape, torch.nan)
    shard.real(local).copy_(shard.cut(whole))
    return local


def test_boxes_are_views_which_loading_fills():
    elements = torch.zeros(11)
    for box in Fragment("w", (4, 5), start=3).boxes(elements):
        box.tensor.add_(1)
    assert (elements == 1).all()


def test_boxes_on_meta_are_made_one_by_one():
    whole = torch.randn(4, 5)
    asked = []

    def make(first: int, numel: int) -> Tensor:
        asked.append((first, numel))
        return whole.flatten()[3:][first : first + numel]

    shard = Shard(1, 4, 4, (4, 8))  # its last column is padding
    boxes = list(Fragment("w", (4, 5), shard, 3).boxes(torch.empty(11, device="meta"), make))
    assert not asked
    assert [(box.offsets, box.extent) for box in boxes] == [((0, 7), (1, 1)), ((1, 4), (1, 4)), ((2, 4), (1, 4))]
    for box in boxes:
        row, column = box.offsets
        assert box.tensor.is_meta
        assert torch.equal(box.make(), whole[row : row + 1, column - 4 : column - 4 + box.extent[1]])
    assert asked == [(0, 2), (2, 5), (7, 4)]


def test_what_is_padding_alone_is_no_box():
    shard = Shard(0, 8, 0, (8, 5))
    assert list(Fragment("w", (2, 5), shard, 0).boxes(torch.zeros(10))) == []
    assert list(Fragment("w", (2, 5), shard).whole(torch.zeros(2, 5))) == []
