"""Ranks, axes, and what does not fit."""

import pytest

from neox_hf.errors import TopologyError
from neox_hf.parallel import Topology


def test_single_is_the_world_of_one():
    single = Topology.single()
    assert (single.world_size, single.rank, single.data_rank, single.tensor_rank, single.pipeline_rank) == (
        1,
        0,
        0,
        0,
        0,
    )


def test_tensor_is_innermost_and_pipeline_outermost():
    ranks = [Topology.from_world(8, rank, tensor=2, pipeline=2) for rank in range(8)]
    assert [one.tensor_rank for one in ranks] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [one.data_rank for one in ranks] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [one.pipeline_rank for one in ranks] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_sizes_that_do_not_divide_the_world():
    with pytest.raises(TopologyError, match=r"tensor=2 x parallel.pipeline=2 = 4 does not divide world_size=6"):
        Topology.from_world(6, 0, tensor=2, pipeline=2)
