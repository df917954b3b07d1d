"""The evaluation set: the first samples of the held-out split, the same at every data size."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from neox_hf.data.bad_rows import without_copies
from neox_hf.data.batches import make_batch
from neox_hf.data.settings import DataSettings
from neox_hf.data.stream import TokenStream
from neox_hf.errors import DataError


class EvaluationBatches:
    """This rank's share of the evaluation set, in batches of one size. Can be iterated any number of times.

    Sample j goes to data rank j mod d. Every rank has the same number of batches of equal shape. With `eod_mask_loss`
    they differ in how many labels they have, by the documents that end in them; `NeoXTrainer` weighs every label alike.
    Memory: 4 bytes for each of the rank's tokens.

    bad_rows: rows dropped while reading the set, by class. Every rank reads the whole set; only data rank 0 counts
        them and keeps copies.
    """

    def __init__(self, samples: np.ndarray, batch_size: int, settings: DataSettings, stream: TokenStream) -> None:
        """samples: int32 [a multiple of batch_size, seq_length + 1]."""
        self._samples = samples
        self.batch_size = batch_size
        self._settings = settings
        self._end_of_document = stream.encoder.end_of_document
        self.bad_rows = stream.bad_rows.counts

    def __len__(self) -> int:
        return len(self._samples) // self.batch_size

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        return make_batch(
            self._samples[number * self.batch_size : (number + 1) * self.batch_size],
            self._end_of_document,
            document_mask=self._settings.document_mask,
            eod_mask_loss=self._settings.eod_mask_loss,
        )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[number] for number in range(len(self)))


def evaluation_batches(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerFast,
    *,
    batch_size: int,
    data_rank: int = 0,
    data_size: int = 1,
    vocab_size: int | None = None,
    quarantine: Path = Path("quarantine.jsonl"),
) -> EvaluationBatches:
    """Reads the first `eval_samples` samples of the eval split (`batch_size` is per rank) and keeps this rank's.

    Raises DataError when they cannot be shared out in equal batches, or the split holds fewer without repeating a
    document.
    """
    step = batch_size * data_size
    count = settings.eval_samples
    if count < 1 or count % step:
        nearest = sorted({max(step, count // step * step), -(-max(count, 1) // step) * step})
        raise DataError(
            f"data.eval_samples={count} cannot be shared out: {data_size} data rank(s) x batches of {batch_size} take "
            f"multiples of {step}; set it to {' or '.join(map(str, nearest))}"
        )
    if data_rank != 0:
        settings = replace(settings, bad_rows=without_copies(settings.bad_rows))
    stream = TokenStream(settings, tokenizer, split="eval", vocab_size=vocab_size, quarantine=quarantine)
    mine = []
    for sample in islice(stream, count):
        if sample.next.epoch > 0:
            raise DataError(
                f"the eval split holds only {sample.index} sample(s) of {settings.seq_length} tokens, "
                f"data.eval_samples asks for {count}; "
                f"lower it, or give more data.eval_sources or a larger data.eval_fraction ({settings.eval_fraction})"
            )
        if sample.index % data_size == data_rank:
            mine.append(sample.tokens)
    if data_rank != 0:
        stream.bad_rows.counts.clear()
    return EvaluationBatches(np.stack(mine), batch_size, settings, stream)
