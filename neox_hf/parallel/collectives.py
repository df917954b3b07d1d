"""Agreements between ranks that are not part of a step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from neox_hf.errors import CheckpointError, DataError, DivergenceError, RecipeError, TopologyError
from neox_hf.parallel.topology import Topology

T = TypeVar("T")

TRAVELLING = (
    RecipeError,
    TopologyError,
    DataError,
    DivergenceError,
    CheckpointError,
    ValueError,
    OSError,
    RuntimeError,
)
"""What an error becomes on its way to another rank: all are made from a message, which another kind may not be."""


@contextmanager
def end_of_gloo() -> Iterator[None]:
    """Destroys the process group at its end, if it was made inside, runs over gloo, and no error has come.

    gloo's threads let go of a message's tensors a little after it is done. Where the interpreter has ended meanwhile
    they abort the process (pytorch/pytorch#179291), and a run that went well would exit with SIGABRT. NCCL's groups
    have no such threads, and to destroy them waits for every CUDA graph with a message in it.
    """
    was_there = dist.is_initialized()
    yield
    if not was_there and dist.is_initialized() and dist.get_backend() == dist.Backend.GLOO:
        dist.destroy_process_group()


def from_first_rank(topology: Topology, compute: Callable[[], T]) -> T:
    """What `compute` returns on rank 0, on every rank. What is returned must pickle.

    Raises:
        Exception: on rank 0 whatever `compute` raised. On the others its nearest relative of TRAVELLING, so that none
            is left waiting for a rank that has gone; its `spoken_by_first_rank` is True.
    """
    if topology.world_size == 1:
        return compute()
    if topology.rank == 0:
        return _compute_and_tell(compute)
    answer: list[object] = [None, None]
    dist.broadcast_object_list(answer, src=0)
    result, failure = answer
    if failure is not None:
        kind, message = failure
        error = kind(message)
        error.spoken_by_first_rank = True
        raise error
    return result


def _compute_and_tell(compute: Callable[[], T]) -> T:
    try:
        result = compute()
    except Exception as raised:
        dist.broadcast_object_list([None, _kind_and_message(raised)], src=0)
        raise
    dist.broadcast_object_list([result, None], src=0)
    return result


def _kind_and_message(raised: Exception) -> tuple[type[Exception], str]:
    own = type(raised)
    kind = next((parent for parent in own.__mro__ if parent in TRAVELLING), RuntimeError)
    return kind, str(raised) if kind is own else f"{own.__name__}: {raised}"


def first_rank_first(topology: Topology, compute: Callable[[], T]) -> T:
    """`compute` on rank 0, and once that is done on every other rank, which may find there what rank 0 left.

    Raises:
        Exception: see `from_first_rank`.
    """
    mine: list[T] = []
    from_first_rank(topology, lambda: mine.append(compute()))
    return mine[0] if mine else compute()


def together(topology: Topology, compute: Callable[[], T]) -> T:
    """What `compute` returns on this rank, once it has returned on every rank; `compute` itself must not communicate.

    Raises:
        Exception: on a rank that failed whatever `compute` raised; on the others the lowest such rank's error, as its
            nearest relative of TRAVELLING. So no rank goes on, or waits, while another has given up. Rank 0 tells of
            it: elsewhere `spoken_by_first_rank` is True.
    """
    if topology.world_size == 1:
        return compute()
    result, raised = None, None
    try:
        result = compute()
    except Exception as error:  # noqa: BLE001 - raised below, when all ranks know of it
        raised = error
    failures: list[tuple[type[Exception], str] | None] = [None] * topology.world_size
    dist.all_gather_object(failures, None if raised is None else _kind_and_message(raised))
    failed = [(rank, *failure) for rank, failure in enumerate(failures) if failure is not None]
    if not failed:
        return result
    rank, kind, message = failed[0]
    error = raised or kind(f"rank {rank}: {message}")
    error.spoken_by_first_rank = topology.rank != 0
    raise error
