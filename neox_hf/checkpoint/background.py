"""Checkpoints written while training goes on.

The step's thread copies everything to host memory; a thread of each rank then writes, hashes and syncs its files and
leaves its done record. Rank 0's thread waits for all records and finishes. Threads talk through the file system alone:
a collective in one of them could meet the step's in another order on another rank.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from neox_hf.checkpoint.durable import writing
from neox_hf.checkpoint.host_memory import HostMemory
from neox_hf.checkpoint.writer import CheckpointWriter
from neox_hf.errors import CheckpointError
from neox_hf.parallel.collectives import from_first_rank, together
from neox_hf.parallel.topology import Topology

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 1800.0
POLL_SECONDS = 0.05

Continuation = Callable[[Path], None]
"""What follows a finished checkpoint on rank 0, in its thread: rotation, publishing."""


class CheckpointSaver:
    """Commits checkpoints, in the background or at once. At most one is in flight.

    Args:
        asynchronous: return from `commit` when this rank's data are in host memory, which is `memory`.
        patience: seconds that rank 0 waits for the other ranks' files after its own are written.
    """

    def __init__(self, topology: Topology, *, asynchronous: bool = False, patience: float = PATIENCE_SECONDS) -> None:
        self.topology = topology
        self.memory = HostMemory() if asynchronous else None
        self._patience = patience
        self._flight: _Flight | None = None

    def commit(self, writer: CheckpointWriter, metadata: Mapping[str, Any], then: Continuation) -> None:
        """Finish what `writer` was given, and call `then` with the path on rank 0. Every rank calls it.

        Raises:
            CheckpointError: something could not be written; if asynchronous, `wait` raises it.
        """
        assert self._flight is None, "the checkpoint before must be waited for before the next is begun"
        assert writer.memory is self.memory, "a background writer must have copies of its own, and no other"
        if self.memory is None:
            path = writer.commit(metadata)
            if self.topology.rank == 0:
                then(path)
            return
        self._flight = _Flight(writer, metadata, then, self._patience)

    def wait(self) -> None:
        """Wait for the checkpoint in flight, if there is one; then `memory` is free. Every rank calls it: before the
        next checkpoint is begun, before any is read, and at the end.

        Raises:
            CheckpointError: on every rank, when it could not be written.
        """
        flight = self._flight
        if flight is not None:
            try:
                together(self.topology, flight.wait_for_own_part)
                from_first_rank(self.topology, flight.wait_for_all)
            except Exception:
                flight.abandon()
                self._flight = None
                raise
            self._flight = None  # and not where an interrupt ended the waiting: then its thread still writes
        if self.memory is not None:
            self.memory.clear()

    def let_finish(self, seconds: float) -> None:
        """Give the checkpoint in flight some time, and tell nobody how it went: for a rank that ends by an error of its
        own or for want of a peer. What all ranks had written by then is not lost."""
        if self._flight is not None:
            self._flight.join(seconds)


class _Flight:
    """One checkpoint in the making, on one rank."""

    def __init__(
        self, writer: CheckpointWriter, metadata: Mapping[str, Any], then: Continuation, patience: float
    ) -> None:
        self._writer, self._metadata, self._then, self._patience = writer, dict(metadata), then, patience
        self._sealed, self._abandoned = threading.Event(), threading.Event()
        self._error: Exception | None = None
        # A daemon: a process that dies of something else must not stay for its checkpoint.
        self._thread = threading.Thread(target=self._run, name=f"checkpoint-{writer.step}", daemon=True)
        self._thread.start()

    def wait_for_own_part(self) -> None:
        self._sealed.wait()
        self._raise_error()

    def wait_for_all(self) -> None:
        self._thread.join()
        self._raise_error()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def abandon(self) -> None:
        """Give up on the other ranks, and let the thread end."""
        self._abandoned.set()
        self._thread.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._write()
        except Exception as error:  # noqa: BLE001 - it is raised again in the thread that waits
            logger.error("checkpoint of step %d: %s", self._writer.step, error)
            self._error = error if isinstance(error, CheckpointError) else _as_checkpoint_error(self._writer, error)
        finally:
            self._sealed.set()

    def _write(self) -> None:
        writer = self._writer
        with writing(writer.path):
            writer.write_deferred()
            writer.seal()
        self._sealed.set()
        if writer.rank == 0:
            self._wait_for_other_ranks()
            self._then(writer.finish(self._metadata))

    def _wait_for_other_ranks(self) -> None:
        deadline = time.monotonic() + self._patience
        while missing := self._writer.unsealed_ranks():
            if self._abandoned.wait(POLL_SECONDS):
                raise CheckpointError(f"ranks {missing} could not write their part of {self._writer.path}")
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"ranks {missing} did not finish their part of {self._writer.path} within {self._patience:.0f} s: "
                    "they have died, or their disk hangs. Earlier checkpoints are untouched; resume from the newest"
                )


def _as_checkpoint_error(writer: CheckpointWriter, error: Exception) -> CheckpointError:
    wrapped = CheckpointError(f"the checkpoint of step {writer.step} failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
