"""What rank 0 decides, every rank knows; what it refuses, every rank raises."""

import pytest

from neox_hf.errors import CheckpointError
from neox_hf.parallel.collectives import first_rank_first, from_first_rank
from neox_hf.parallel.topology import Topology
from tests.gloo import run_ranks


def decide(rank: int) -> str:
    topology = Topology.from_world(2, rank)
    assert from_first_rank(topology, lambda: f"decided by {rank}") == "decided by 0"
    with pytest.raises(CheckpointError, match="no room on rank 0"):
        from_first_rank(topology, refuse)
    order: list[int] = []
    first_rank_first(topology, lambda: order.append(rank))
    assert order == [rank]
    return "done"


def refuse() -> None:
    raise CheckpointError("no room on rank 0")


def test_two_ranks():
    assert run_ranks(decide, 2) == ["done", "done"]


def test_one_rank_just_computes():
    assert from_first_rank(Topology.single(), lambda: 3) == 3
    assert first_rank_first(Topology.single(), lambda: 4) == 4
