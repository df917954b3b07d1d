"""Samples to batches, and the position of the run as the trainer has seen it."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch

from neox_hf.data.batches import make_batch
from neox_hf.data.prefetch import Prefetch
from neox_hf.data.state import rank_state, restored_position
from neox_hf.data.stream import Position, Sample, TokenStream
from neox_hf.data.workers import WorkerPool

Batch = dict[str, torch.Tensor]

BATCHES_AHEAD = 4


class ReadAhead:
    """Batches of one iteration from loader processes, and the thread that makes them ahead.

    Each iteration has its own, so that one that ends late ends nothing of the next.
    """

    def __init__(self, pool: WorkerPool, batches_of: Callable[[Iterator[Sample]], Iterator], ahead: int) -> None:
        self.pool = pool
        self._prefetch = Prefetch(batches_of(pool.samples()), ahead)

    def __iter__(self) -> Iterator[tuple[list[Sample], Batch]]:
        return iter(self._prefetch)

    def close(self) -> None:
        """Ends the thread and the processes; again is no harm."""
        self._prefetch.close(unblock=self.pool.kill)
        self.pool.close()


class StreamLoader:
    """Endless batches of `batch_size` samples of one data rank.

    The order of samples does not depend on `batch_size` or `workers` (processes beside this one; 0 reads in this
    one). With workers a thread makes batches, up to `ahead` of them before they are asked for: a step that takes all
    its micro-batches at once does not wait for them. Iterating again goes on where the last batch handed out ended.
    """

    def __init__(
        self,
        stream: TokenStream,
        batch_size: int,
        workers: int = 0,
        pin_memory: bool = False,
        ahead: int = BATCHES_AHEAD,
    ) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.workers = workers
        self.pin_memory = pin_memory
        self.ahead = ahead
        self._position = stream.position
        self._taken = 0
        self._read_ahead: ReadAhead | None = None
        # All keys from the start: the thread sets values while others sum them up.
        self._worker_bad_rows = {worker: Counter[str]() for worker in range(workers)}
        self._fingerprint = stream.fingerprint()

    def __iter__(self) -> Iterator[Batch]:
        """Batches as docs/architecture.md names their parts. Raises DataError, also for what a worker met."""
        self.close()
        self.stream.position = self._position
        self._read_ahead = mine = self._start_read_ahead() if self.workers else None
        batches: Iterable = self._batches_of(self.stream.samples()) if mine is None else mine
        try:
            for taken, batch in batches:
                self._advance(taken)
                yield pinned(batch) if self.pin_memory else batch
        finally:
            if mine is not None:
                mine.close()

    @property
    def bad_rows(self) -> Counter[str]:
        """Dropped rows by class, as this rank has read them in the first epoch, what has been read ahead included."""
        return sum(self._worker_bad_rows.values(), self.stream.bad_rows.counts.copy())

    def state_dict(self) -> dict:
        """The position after the last batch handed out, for JSON. See neox_hf/data/state.py."""
        return rank_state(self._position, self._taken, self.stream.data_rank, self.stream.data_size, self._fingerprint)

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a state of the whole run (`merge_states`) or of this same rank.

        Raises DataError for another run's.
        """
        self.close()
        self._taken = 0
        self._position = restored_position(state, self._fingerprint, self.stream.data_rank, self.stream.data_size)

    def close(self) -> None:
        """Ends the thread and the loader processes, if any."""
        if self._read_ahead is not None:
            self._read_ahead.close()
            self._read_ahead = None

    def _start_read_ahead(self) -> ReadAhead:
        pool = WorkerPool(self.stream, self.workers, on_bad_rows=self._worker_bad_rows.__setitem__)
        return ReadAhead(pool, self._batches_of, self.ahead)

    def _batches_of(self, samples: Iterator[Sample]) -> Iterator[tuple[list[Sample], Batch]]:
        while True:
            taken = list(islice(samples, self.batch_size))
            yield taken, self._batch(taken)

    def _batch(self, samples: list[Sample]) -> Batch:
        settings = self.stream.settings
        return make_batch(
            [sample.tokens for sample in samples],
            self.stream.encoder.end_of_document,
            document_mask=settings.document_mask,
            eod_mask_loss=settings.eod_mask_loss,
        )

    def _advance(self, samples: list[Sample]) -> None:
        cursors = {**self._position.cursors, **{sample.lane: sample.next for sample in samples}}
        self._taken += len(samples)
        self._position = Position(samples[-1].index + self.stream.data_size, cursors)


def pinned(batch: Batch) -> Batch:
    """The batch in page-locked memory; tensors that were one stay one."""
    pages = {tensor: tensor.pin_memory() for tensor in set(batch.values())}  # tensors hash by identity
    return {name: pages[tensor] for name, tensor in batch.items()}
