"""Ranks, axes, groups, and what does not fit."""

import pytest
import torch
import torch.distributed as dist

from neox_hf.errors import TopologyError
from neox_hf.parallel import Topology
from tests.gloo import run_ranks


def test_single_is_the_world_of_one():
    single = Topology.single()
    assert (single.world_size, single.rank, single.data_rank, single.tensor_rank, single.pipeline_rank) == (
        1,
        0,
        0,
        0,
        0,
    )
    assert single.heads_replica
    assert single.is_last_stage
    assert not single.splits_model


def test_tensor_is_innermost_and_pipeline_outermost():
    ranks = [Topology.from_world(8, rank, tensor=2, pipeline=2) for rank in range(8)]
    assert [one.tensor_rank for one in ranks] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [one.data_rank for one in ranks] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [one.pipeline_rank for one in ranks] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [one.rank for one in ranks if one.heads_replica] == [0, 2]
    assert str(ranks[0]) == "8 = 2 pipeline x 2 data x 2 tensor"


def test_groups_along_each_axis():
    place = Topology.from_world(8, 0, tensor=2, pipeline=2)
    assert place.axis_ranks("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert place.axis_ranks("data") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert place.axis_ranks("pipeline") == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_sizes_that_do_not_divide_the_world():
    with pytest.raises(TopologyError, match=r"tensor=2 x parallel.pipeline=2 = 4 does not divide world_size=6"):
        Topology.from_world(6, 0, tensor=2, pipeline=2)


def test_sequence_needs_a_tensor_group():
    assert Topology.from_world(2, 0, tensor=2, sequence=True).sequence
    assert not Topology.from_world(2, 0, sequence=True).sequence


def sums_along_axes(rank: int) -> tuple[list[int], list[bool]]:
    place = Topology.from_world(4, rank, tensor=2).connect()
    sums = []
    for group in (place.groups.tensor, place.groups.data):
        total = torch.tensor(rank)
        dist.all_reduce(total, group=group)
        sums.append(int(total))
    whole = Topology.from_world(4, rank, pipeline=4).connect()
    return sums, [group is None for group in (place.groups.pipeline, whole.groups.pipeline)]


def test_connected_groups_join_the_right_ranks():
    for rank, (sums, without_group) in enumerate(run_ranks(sums_along_axes, 4)):
        assert sums == [[1, 1, 5, 5][rank], [2, 4, 2, 4][rank]]
        assert without_group == [True, True]
