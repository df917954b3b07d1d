"""Runs a function on several CPU ranks at once.

One preloaded fork server starts all ranks of a test session: importing torch and transformers costs seconds a rank
otherwise. A rank that fails ends the others, and its traceback is what the test reports.
"""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext, ForkServerContext
from typing import Any

COVERAGE_FILE = "RANKS_COVERAGE_FILE"
"""Variable with the data file of a session that measures coverage; its ranks leave theirs beside it."""

PRELOAD = ["tests.ready_for_ranks"]
"""Imported once, by the fork server. The first list that a session sets is the only one that counts."""
TIMEOUT_SECONDS = 240


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, context: BaseContext | None = None
) -> list[Any]:
    """`function(rank, *args)` on each of `world_size` gloo ranks; what they return, by rank.

    `function` must be importable, and what goes in and out must pickle. context: for ranks that use CUDA, which what
    the fork server has imported may have started there already.
    """
    context = context or fork_server()
    results = context.SimpleQueue()
    port = free_port()
    ranks = [
        context.Process(target=_rank, args=(function, rank, world_size, port, results, args))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        return _collect(ranks, results, world_size)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def fork_server() -> ForkServerContext:
    """Starts processes in which everything is imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _collect(ranks: list, results: Any, world_size: int) -> list[Any]:
    answers: dict[int, Any] = {}
    while len(answers) < world_size:
        if not results._reader.poll(TIMEOUT_SECONDS):
            raise TimeoutError(f"ranks {sorted(set(range(world_size)) - set(answers))} did not answer")
        rank, answer, failure = results.get()
        assert failure is None, f"rank {rank} failed:\n{failure}"
        answers[rank] = pickle.loads(answer)
    return [answers[rank] for rank in range(world_size)]


@contextmanager
def measured(rank: int) -> Iterator[None]:
    """Adds what the first rank runs to the session's coverage, if it measures any.

    Measuring slows a rank by half, and all ranks together run a line in a thousand that the first does not.
    """
    data_file = os.environ.get(COVERAGE_FILE)
    if data_file is None or rank != 0:
        yield
        return
    from coverage import Coverage

    measuring = Coverage(data_file=data_file, data_suffix=True, source=["neox_hf"])
    measuring.start()
    try:
        yield
    finally:
        measuring.stop()
        measuring.save()


def _rank(function: Callable[..., Any], rank: int, world_size: int, port: int, results: Any, args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        # Plain pickle: a tensor sent as shared memory would be gone with the rank that made it.
        with measured(rank):
            answer = function(rank, *args)
        results.put((rank, pickle.dumps(answer), None))
        dist.barrier()
    except BaseException:  # noqa: BLE001 - reported to the parent, which fails the test
        results.put((rank, None, traceback.format_exc()))
