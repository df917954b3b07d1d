"""Loader processes: each serves some of the rank's streams; the parent puts their samples in the run's order."""

import fcntl
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection

from neox_hf.data.stream import Sample, TokenStream
from neox_hf.errors import DataError

# A worker runs ahead until its pipe is full. This asks for the most that Linux grants unprivileged users.
PIPE_BYTES = 1 << 20
STOP_SECONDS = 5


class WorkerPool:
    """`workers` forked processes over one stream.

    Forked, as nothing of the stream needs to be pickled and no module imported again.
    """

    def __init__(self, stream: TokenStream, workers: int, *, on_bad_rows: Callable[[int, Counter[str]], None]) -> None:
        """`on_bad_rows(worker, counts)` hears of the rows a worker has dropped so far."""
        self._stream = stream
        self._on_bad_rows = on_bad_rows
        self._pipes: list[Connection] = []
        self._processes = []
        context = multiprocessing.get_context("fork")
        for worker in range(workers):
            reading, writing = context.Pipe(duplex=False)
            _enlarge(writing)
            self._pipes.append(reading)
            # Daemons end with the parent's normal exit, whoever forgot to close.
            process = context.Process(
                target=_work,
                args=(stream, worker, workers, writing, list(self._pipes)),
                daemon=True,
                name=f"data-{worker}",
            )
            process.start()
            writing.close()
            self._processes.append(process)

    def samples(self) -> Iterator[Sample]:
        """This rank's samples in the run's order. Raises the DataError that a worker met, or one that says it died."""
        index = self._stream.position.next_sample
        while True:
            worker = self._stream.worker_of(index, len(self._pipes))
            try:
                message = self._pipes[worker].recv()
            except EOFError:
                self._processes[worker].join(STOP_SECONDS)
                raise DataError(
                    f"loader process {worker} died with exit code {self._processes[worker].exitcode} "
                    f"(-9 is mostly the kernel's out-of-memory killer: use fewer data.workers)"
                ) from None
            if isinstance(message, DataError):
                raise message
            sample, counts = message
            if counts is not None:
                self._on_bad_rows(worker, counts)
            assert sample.index == index, f"worker {worker} sent sample {sample.index}, expected {index}"
            yield sample
            index += self._stream.data_size

    def close(self) -> None:
        """Ends the processes and waits for them."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(STOP_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        self._pipes, self._processes = [], []


def _enlarge(pipe: Connection) -> None:
    # Past a total per user the kernel refuses; the default size works too, with less read ahead.
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with suppress(PermissionError):
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _work(stream: TokenStream, worker: int, workers: int, pipe: Connection, inherited: list[Connection]) -> None:
    """Sends samples until the reader is gone."""
    # The parent decides when to stop: its own handlers must not run here, and Ctrl-C reaches the whole process group.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker, and no threads to be lost in the fork
    for reading in inherited:
        reading.close()  # else a worker would keep the pipes of others open after the parent's death
    sent: Counter[str] = Counter()
    stream.bad_rows.counts.clear()
    with suppress(BrokenPipeError):
        try:
            for sample in stream.samples(worker, workers):
                changed = stream.bad_rows.counts != sent
                sent = stream.bad_rows.counts.copy() if changed else sent
                pipe.send((sample, sent if changed else None))
        except DataError as error:
            pipe.send(error)
