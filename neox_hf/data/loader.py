"""Samples to batches, and the position of the run as the trainer has seen it."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import torch

from neox_hf.data.batches import make_batch
from neox_hf.data.state import rank_state, restored_position
from neox_hf.data.stream import Position, Sample, TokenStream
from neox_hf.data.workers import WorkerPool


class StreamLoader:
    """Endless batches of `batch_size` samples of one data rank.

    The order of samples does not depend on `batch_size` or `workers` (processes beside this one; 0 reads in this
    one). Iterating again goes on where the last batch handed out ended.
    """

    def __init__(self, stream: TokenStream, batch_size: int, workers: int = 0, pin_memory: bool = False) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.workers = workers
        self.pin_memory = pin_memory
        self._position = stream.position
        self._taken = 0
        self._pool: WorkerPool | None = None
        self._worker_bad_rows: dict[int, Counter[str]] = {}
        self._fingerprint = stream.fingerprint()

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches as docs/architecture.md names their parts. Raises DataError, also for what a worker met."""
        self.close()
        self.stream.position = self._position
        samples = self._samples()
        try:
            while True:
                taken = list(islice(samples, self.batch_size))
                batch = self._batch(taken)
                self._advance(taken)
                yield batch
        finally:
            self.close()

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
        """Ends the loader processes, if any."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _samples(self) -> Iterator[Sample]:
        if self.workers == 0:
            return self.stream.samples()
        self._pool = WorkerPool(self.stream, self.workers, on_bad_rows=self._worker_bad_rows.__setitem__)
        return self._pool.samples()

    def _batch(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        settings = self.stream.settings
        batch = make_batch(
            [sample.tokens for sample in samples],
            self.stream.encoder.end_of_document,
            document_mask=settings.document_mask,
            eod_mask_loss=settings.eod_mask_loss,
        )
        return pinned(batch) if self.pin_memory else batch

    def _advance(self, samples: list[Sample]) -> None:
        cursors = {**self._position.cursors, **{sample.lane: sample.next for sample in samples}}
        self._taken += len(samples)
        self._position = Position(samples[-1].index + self.stream.data_size, cursors)


def pinned(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch in page-locked memory; tensors that were one stay one."""
    pages = {tensor: tensor.pin_memory() for tensor in set(batch.values())}  # tensors hash by identity
    return {name: pages[tensor] for name, tensor in batch.items()}
