"""Which rows of a source belong to which logical stream, epoch after epoch.

A *turn* is the ordinal of the part, within its epoch, that a stream is in. Two rules, chosen by the
source and the number of streams alone:

- `OwnedParts`: the parts of a source are dealt to the streams. For documents, spans, and as many files as streams,
  which should be about equally large.
- `DealtRows`: there are sequential files, and fewer than streams, so rows are dealt, those of other files in the source
  too. Each process reads the files once for all of its streams, and the rows of other processes' streams are passed
  over unparsed.

In both, place p of epoch e belongs to stream (p - e) mod L: the assignment moves on by one each epoch, so each epoch
is dealt out whole and no stream stays without documents. A stream beyond the end of a small source has none in early
epochs and begins in the first epoch that gives it one.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple, Protocol

from neox_hf.data.hashing import permuted
from neox_hf.data.lines import Row, allow_open_files
from neox_hf.data.sources import Source
from neox_hf.errors import DataError

# A stream that goes this many epochs times L without meeting a row is on a source without rows.
PATIENT_EPOCHS = 32


class Cursor(NamedTuple):
    """Where a stream stands in one source: the document that holds its next token, and the tokens of it behind.

    position: of the row in its part; None is the part's beginning. offset: tokens.
    """

    epoch: int = 0
    turn: int = 0
    position: int | None = None
    offset: int = 0


class Place(NamedTuple):
    """A row, and the cursor of its first token."""

    cursor: Cursor
    part: int
    row: Row


class Order(NamedTuple):
    """The order of parts in each epoch: theirs, or a permutation of it."""

    parts: int
    shuffle: bool
    seed: int
    source: int

    def part(self, epoch: int, index: int) -> int:
        return permuted(index, self.parts, self.seed, self.source, epoch) if self.shuffle else index


class Assignment(Protocol):
    def rows(self, stream: int) -> Iterator[Place]:
        """The rows of one stream from its starting cursor on, without end. Raises DataError when there are none."""


class OwnedParts:
    """Whole parts are dealt; the streams are independent of each other. Keeps one open part per stream."""

    def __init__(self, source: Source, order: Order, streams: int, starts: Mapping[int, Cursor]) -> None:
        self._source, self._order, self._streams, self._starts = source, order, streams, starts

    def rows(self, stream: int) -> Iterator[Place]:
        epoch, turn, position, _ = self._starts.get(stream, Cursor())
        last_row_epoch = epoch
        while epoch - last_row_epoch <= PATIENT_EPOCHS * self._streams:
            first = (stream + epoch) % self._streams
            index = first + turn * self._streams
            if index >= self._order.parts:
                # With fewer parts than streams most epochs hold nothing for this one; go to the next that does.
                idle = self._streams - first if first >= self._order.parts else 1
                epoch, turn, position = epoch + idle, 0, None
                continue
            part = self._order.part(epoch, index)
            for row in self._source.rows(part, position):
                last_row_epoch = epoch
                yield Place(Cursor(epoch, turn, row.position), part, row)
            turn, position = turn + 1, None
        raise DataError(f"data.sources: {self._source.path} holds no row that stream {stream} could read")


class DealtRows:
    """Rows of sequential files are dealt. One reader serves all streams of the process.

    Memory: a stream of long documents advances more slowly than one of short ones, and the rows in between wait here.
    Their number grows with the square root of the rows read, to about 1 % of a file after 100 000 rows per stream.
    Give large compressed data as at least `data.streams` files of about equal size, or uncompressed, and nothing waits.
    """

    def __init__(
        self, source: Source, order: Order, streams: int, starts: Mapping[int, Cursor], owned: Collection[int]
    ) -> None:
        self._source, self._order, self._streams = source, order, streams
        self._starts = {stream: starts.get(stream, Cursor()) for stream in owned}
        self._waiting: dict[int, deque[Place]] = {stream: deque() for stream in owned}
        self._reader = self._read()

    def rows(self, stream: int) -> Iterator[Place]:
        waiting = self._waiting[stream]
        while True:
            while not waiting:
                owner, place = next(self._reader)
                self._waiting[owner].append(place)
            yield waiting.popleft()

    def _read(self) -> Iterator[tuple[int, Place]]:
        """Rows of this process's streams in file order, from the earliest starting cursor on."""
        epoch, first_turn = min((start.epoch, start.turn) for start in self._starts.values())
        positions = [
            start.position for start in self._starts.values() if (start.epoch, start.turn) == (epoch, first_turn)
        ]
        position = None if None in positions else min(positions)
        while True:
            rows_seen = first_turn > 0
            for turn in range(first_turn, self._order.parts):
                part = self._order.part(epoch, turn)
                for row in self._source.rows(part, position):
                    rows_seen = True
                    owner = (row.position - epoch - turn) % self._streams
                    cursor = Cursor(epoch, turn, row.position)
                    if owner in self._starts and not _is_before(cursor, self._starts[owner]):
                        yield owner, Place(cursor, part, row)
                position = None
            if not rows_seen:
                raise DataError(f"data.sources: {self._source.path} holds no row")
            epoch, first_turn = epoch + 1, 0


def _is_before(cursor: Cursor, start: Cursor) -> bool:
    return (cursor.epoch, cursor.turn, cursor.position) < (start.epoch, start.turn, start.position or 0)


def assign(
    source: Source, order: Order, streams: int, starts: Mapping[int, Cursor], owned: Collection[int]
) -> Assignment:
    """The rule for a source. `owned`: this process's streams; `starts`: cursors of those not at their beginning."""
    if 0 < source.sequential_parts < streams:
        return DealtRows(source, order, streams, starts, owned)
    if source.sequential_parts:
        allow_open_files(len(owned))
    return OwnedParts(source, order, streams, starts)
