"""Agreements between ranks that are not part of a step."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from neox_hf.parallel.topology import Topology

T = TypeVar("T")


def from_first_rank(topology: Topology, compute: Callable[[], T]) -> T:
    """What `compute` returns on rank 0, on every rank. What is returned must pickle.

    Raises:
        ValueError: whatever error of that family, or OSError, `compute` raised; on every rank, so that none is left
            waiting for a rank that has gone.
    """
    if topology.world_size == 1:
        return compute()
    answer: list[object] = [None, None]
    error: Exception | None = None
    if topology.rank == 0:
        try:
            answer[0] = compute()
        except (ValueError, OSError) as raised:
            error = raised
            answer[1] = type(raised)(*raised.args)
    dist.broadcast_object_list(answer, src=0)
    if error is not None:
        raise error
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def first_rank_first(topology: Topology, compute: Callable[[], T]) -> T:
    """`compute` on rank 0, and once that is done on every other rank, which may find there what rank 0 left.

    Raises:
        ValueError: see `from_first_rank`.
    """
    mine: list[T] = []
    from_first_rank(topology, lambda: mine.append(compute()))
    return mine[0] if mine else compute()
