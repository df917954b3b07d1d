"""Loader processes: each serves some of the rank's streams; the parent puts their samples in the run's order."""

import fcntl
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize

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
        # At exit multiprocessing sends daemons the SIGTERM that these ignore: they must be gone before that.
        Finalize(self, _kill, args=(self._processes,), exitpriority=1)

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

    def kill(self) -> None:
        """Ends the processes; whoever waits for a sample is told so by an error. They keep nothing worth a farewell."""
        _kill(self._processes)

    def close(self) -> None:
        """Ends the processes and waits for them. No other thread may be waiting for a sample."""
        self.kill()
        for pipe in self._pipes:
            pipe.close()
        self._pipes, self._processes = [], []


def _kill(processes: list[multiprocessing.Process]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _enlarge(pipe: Connection) -> None:
    # Past a total per user the kernel refuses; the default size works too, with less read ahead.
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with suppress(PermissionError):
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _work(stream: TokenStream, worker: int, workers: int, pipe: Connection, inherited: list[Connection]) -> None:
    """Sends samples until the reader is gone."""
    # The parent decides when to stop. A scheduler signals all processes of a job, Ctrl-C the whole process group: a
    # worker that died of it would take the checkpoint with it that the parent is about to write.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
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
