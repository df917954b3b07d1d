"""What rank 0 decides, every rank knows; what it refuses, every rank raises."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch.distributed as dist

from neox_hf.errors import CheckpointError, DataError
from neox_hf.parallel.collectives import end_of_gloo, first_rank_first, from_first_rank, together
from neox_hf.parallel.topology import Topology
from tests.gloo import run_ranks


def decide(rank: int) -> str:
    topology = Topology.from_world(2, rank)
    assert from_first_rank(topology, lambda: f"decided by {rank}") == "decided by 0"
    with pytest.raises(CheckpointError, match="no room on rank 0"):
        from_first_rank(topology, refuse)
    assert [how_it_ends(topology, failure) for failure in FAILURES] == (FIRST if rank == 0 else OTHERS)
    order: list[int] = []
    first_rank_first(topology, lambda: order.append(rank))
    assert order == [rank]
    return "done"


def refuse() -> None:
    raise CheckpointError("no room on rank 0")


class Elaborate(DataError):
    """Cannot be made from its own `args`."""

    def __init__(self, source: str, *, line: int) -> None:
        super().__init__(f"{source}:{line} is torn")


def tear() -> None:
    raise Elaborate("a.jsonl", line=3)


FAILURES = [refuse, tear, lambda: json.loads("{"), lambda: Path("/no/such").read_text(), lambda: {}["key"]]
"""What fails on rank 0, in as many ways."""

NO_FILE = "[Errno 2] No such file or directory: '/no/such'"
NO_JSON = "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
FIRST = [
    ("CheckpointError", "no room on rank 0", False),
    ("Elaborate", "a.jsonl:3 is torn", False),
    ("JSONDecodeError", NO_JSON, False),
    ("FileNotFoundError", NO_FILE, False),
    ("KeyError", "'key'", False),
]
OTHERS = [
    ("CheckpointError", "no room on rank 0", True),
    ("DataError", "Elaborate: a.jsonl:3 is torn", True),
    ("ValueError", f"JSONDecodeError: {NO_JSON}", True),
    ("OSError", f"FileNotFoundError: {NO_FILE}", True),
    ("RuntimeError", "KeyError: 'key'", True),
]


def how_it_ends(topology: Topology, failure: Callable[[], object]) -> tuple[str, str, bool]:
    with pytest.raises(Exception) as ended:
        from_first_rank(topology, failure)
    error = ended.value
    return type(error).__name__, str(error), getattr(error, "spoken_by_first_rank", False)


def test_two_ranks():
    assert run_ranks(decide, 2) == ["done", "done"]


def test_one_rank_just_computes():
    assert from_first_rank(Topology.single(), lambda: 3) == 3
    assert first_rank_first(Topology.single(), lambda: 4) == 4
    assert together(Topology.single(), lambda: 5) == 5


def fail_together(rank: int) -> list[tuple[str, str, bool]]:
    topology = Topology.from_world(3, rank)
    assert together(topology, lambda: f"of {rank}") == f"of {rank}"
    seen = []
    for failing in ([1], [0, 2]):
        with pytest.raises(Exception) as ended:
            together(topology, tear if rank in failing else lambda: None)
        error = ended.value
        seen.append((type(error).__name__, str(error), error.spoken_by_first_rank))
    return seen


def test_all_ranks_fail_together_and_rank_0_speaks():
    torn = "a.jsonl:3 is torn"
    assert run_ranks(fail_together, 3) == [
        [("DataError", f"rank 1: Elaborate: {torn}", False), ("Elaborate", torn, False)],
        [("Elaborate", torn, True), ("DataError", f"rank 0: Elaborate: {torn}", True)],
        [("DataError", f"rank 1: Elaborate: {torn}", True), ("Elaborate", torn, True)],
    ]


def groups_at_the_end(rank: int) -> list[bool]:
    with end_of_gloo():
        pass
    after = [dist.is_initialized()]
    dist.destroy_process_group()
    with suppress(DataError), end_of_gloo():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        raise DataError("met in a run")
    after.append(dist.is_initialized())
    dist.destroy_process_group()
    with end_of_gloo():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    after.append(dist.is_initialized())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # as it was found
    return after


def test_a_group_of_gloo_ends_with_the_run_that_made_it():
    """One that was there before stays, and one of a run that has failed, whose peers may still be in a message."""
    assert run_ranks(groups_at_the_end, 1) == [[True, True, False]]
