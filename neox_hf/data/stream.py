"""The endless token stream of a run: which sample comes when, for one data rank.

Sample j of the run is the next sample of logical stream j mod L, and data rank r of d yields the samples j = r mod d,
which are those of the streams l = r mod d. Which source a sample comes from is a function of j. Nothing depends on
the number of ranks or workers.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from neox_hf.data.assignment import Assignment, Cursor, Order, assign
from neox_hf.data.bad_rows import BadRowPolicy, without_copies
from neox_hf.data.documents import Split, read_documents
from neox_hf.data.encoding import DocumentEncoder, tokenizer_fingerprint
from neox_hf.data.hashing import WeightedChoice
from neox_hf.data.packing import Packer
from neox_hf.data.settings import DataSettings, SourceSettings
from neox_hf.data.sources import Source, open_source
from neox_hf.errors import DataError

# (number of the source, logical stream): each lane is packed on its own, so a source's samples do not depend on the
# others' lengths.
Lane = tuple[int, int]


class Sample(NamedTuple):
    """tokens: int32 [seq_length + 1].

    index: j, its number in the run. lane: where it came from. next: the lane's cursor after it.
    """

    tokens: np.ndarray
    index: int
    lane: Lane
    next: Cursor


class Position(NamedTuple):
    """How far a stream is: the number of its next sample, and the cursors of the lanes that have yielded any."""

    next_sample: int
    cursors: Mapping[Lane, Cursor]


class TokenStream:
    """Endless samples of one split for one data rank, in the run's order. Repeats its data epoch after epoch.

    A logical stream owns whole parts of a source (documents, spans of lines, files), or every L-th row where there are
    fewer sequential files than streams. Each epoch moves the assignment on by one stream, so a stream that a small
    source gives nothing in epoch 0 starts with the first epoch that gives it a document: no stream is ever empty, and
    which documents it reads is a function of the recipe alone.

    The held-out split is one logical stream, read by `evaluation_batches`.

    Memory, for each stream of this rank: the tokens of one document and a read buffer (64 KiB for plain lines, a
    decompressor for compressed files, a batch of 64 rows for parquet). Compressed and parquet files, where there are
    at least L parts of them, keep one file open per stream. Fewer, see `DealtRows`.
    """

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerFast,
        *,
        split: Literal["train", "eval"],
        data_rank: int = 0,
        data_size: int = 1,
        vocab_size: int | None = None,
        quarantine: Path = Path("quarantine.jsonl"),
    ) -> None:
        """`vocab_size`: rows of the model's embedding; `quarantine`: where `bad_rows: quarantine` keeps rows.

        Raises DataError when the settings cannot be met or a source holds nothing.
        """
        self.settings = settings
        self.streams = settings.streams if split == "train" else 1
        self.data_rank, self.data_size = data_rank, data_size
        self._check_sizes(split)
        self.encoder = DocumentEncoder(tokenizer, vocab_size)
        self.bad_rows = BadRowPolicy(settings.bad_rows, quarantine)
        self.split, self._chosen = choose_split(settings, split)
        # Every rank meets the faults of whole files; the first one records them.
        opening = self.bad_rows if data_rank == 0 else BadRowPolicy(without_copies(settings.bad_rows), quarantine)
        self._sources = open_sources(self._chosen, settings, self.streams, opening)
        self._choice = WeightedChoice([source.weight for source in self._chosen], self.streams)
        self._tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
        self.position = Position(data_rank, {})

    def fingerprint(self) -> dict[str, object]:
        """What defines the token sequence.

        Two streams with equal fingerprints yield equal samples from equal positions.

        `bad_rows` and `max_line_bytes` are not part of it: a run that stopped at a bad row goes on with another policy.
        """
        return {
            **documents_fingerprint(self.settings, self.split, self._chosen, self._sources),
            **self._changed_rules(),
            "tokenizer": self._tokenizer_fingerprint,
            "seq_length": self.settings.seq_length,
            "streams": self.streams,
        }

    def _changed_rules(self) -> dict[str, str]:
        """Of those that apply, the rules that versions before 2026-12 had otherwise: their positions are none here."""
        mixed = {"mixed": "stream by stream"} if len(self._sources) > 1 else {}
        by_rows = any(0 < source.sequential_parts < source.parts for source in self._sources)
        return mixed | ({"plain files beside compressed ones": "dealt row by row"} if by_rows else {})

    def __iter__(self) -> Iterator[Sample]:
        return self.samples()

    def samples(self, worker: int = 0, workers: int = 1) -> Iterator[Sample]:
        """From `self.position` on: all samples of this rank, or those of the streams of one of its `workers`.

        Worker w has the rank's w-th, (w + workers)-th, ... stream, and yields its samples in the run's order.
        """
        owned = range(self.data_rank + worker * self.data_size, self.streams, workers * self.data_size)
        assignments = [self._assignment(number, owned) for number in range(len(self._sources))]
        packers: dict[Lane, Packer] = {}
        index = self.position.next_sample
        while owned:
            stream = index % self.streams
            if stream in owned:
                lane = (self._choice(index), stream)
                if lane not in packers:
                    packers[lane] = self._packer(lane, assignments)
                tokens, cursor = packers[lane].next_sample()
                yield Sample(tokens, index, lane, cursor)
            index += self.data_size

    def worker_of(self, index: int, workers: int) -> int:
        """Which worker yields sample `index` of this rank."""
        return index % self.streams // self.data_size % workers

    def _assignment(self, number: int, owned: range) -> Assignment:
        source, settings = self._sources[number], self.settings
        order = Order(source.parts, settings.shuffle, settings.seed, number)
        starts = {stream: cursor for (lane, stream), cursor in self.position.cursors.items() if lane == number}
        return assign(source, order, self.streams, starts, owned)

    def _packer(self, lane: Lane, assignments: list[Assignment]) -> Packer:
        number, stream = lane
        rows = assignments[number].rows(stream)
        documents = read_documents(self._sources[number], rows, self.streams, self.split, self.bad_rows)
        offset = self.position.cursors.get(lane, Cursor()).offset
        return Packer(documents, self.encoder, self.settings.seq_length, offset)

    def _check_sizes(self, split: str) -> None:
        settings = self.settings
        if settings.seq_length < 1:
            raise DataError(f"data.seq_length={settings.seq_length} must be at least 1")
        if settings.streams < 1:
            raise DataError(f"data.streams={settings.streams} must be at least 1")
        if self.streams % self.data_size:
            what = (
                f"data.streams={self.streams}"
                if split == "train"
                else "the one stream of the eval split (evaluation_batches shares it out)"
            )
            raise DataError(
                f"the data-parallel size {self.data_size} does not divide {what}; set data.streams to a multiple "
                f"of it, such as {_next_multiple(self.streams, self.data_size)} (the order of samples depends on it)"
            )


def choose_split(settings: DataSettings, name: Literal["train", "eval"]) -> tuple[Split, list[SourceSettings]]:
    """The sources of a split, and the fraction of their documents that is held out of training."""
    if not settings.sources:
        raise DataError("data.sources is empty; name at least one source, such as `- path: stdlib`")
    if not 0 <= settings.eval_fraction < 1:
        raise DataError(f"data.eval_fraction={settings.eval_fraction} must be at least 0 and less than 1")
    if settings.eval_sources:
        return Split(name, 0.0), settings.sources if name == "train" else settings.eval_sources
    if name == "eval" and settings.eval_fraction == 0:
        raise DataError("there is nothing to evaluate on: set data.eval_sources, or data.eval_fraction above 0")
    return Split(name, settings.eval_fraction), settings.sources


def open_sources(
    chosen: list[SourceSettings], settings: DataSettings, streams: int, bad_rows: BadRowPolicy
) -> list[Source]:
    return [open_source(one, streams=streams, limit=settings.max_line_bytes, bad_rows=bad_rows) for one in chosen]


def documents_fingerprint(
    settings: DataSettings, split: Split, chosen: Sequence[SourceSettings], sources: Sequence[Source]
) -> dict[str, object]:
    """What defines the documents of a split and their order, for JSON. `sources` are the opened `chosen`."""
    return {
        "sources": [source.fingerprint() for source in sources],
        "weights": [source.weight for source in chosen],
        "text": [[source.text_key, source.sample_by] for source in chosen],
        "shuffle": settings.shuffle,
        "seed": settings.seed,
        "held_out": split.held_out,
    }


def _next_multiple(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor
