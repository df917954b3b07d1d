"""Documents of one stream of one source: the rows of its split, read as text, the bad ones dealt with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from neox_hf.data.assignment import PATIENT_EPOCHS, Cursor, Place
from neox_hf.data.bad_rows import BadRow, BadRowPolicy
from neox_hf.data.hashing import is_held_out
from neox_hf.data.sources import Source
from neox_hf.errors import DataError

# A stream gives up after two epochs and this many unusable rows in a row, or after PATIENT_EPOCHS times L epochs.
PATIENT_ROWS = 10_000


class Document(NamedTuple):
    """A text, the cursor of its first token, and how to say where it stands ("file:line")."""

    cursor: Cursor
    text: str
    where: Callable[[], str]


@dataclass(frozen=True)
class Split:
    """Which documents a stream takes.

    `held_out` is the fraction that training leaves to evaluation; 0 takes every document.
    """

    name: Literal["train", "eval"]
    held_out: float

    def takes(self, source: Source, place: Place) -> bool:
        if self.held_out == 0:
            return True
        key = source.key(place.part, place.row.position)
        return is_held_out(self.held_out, *key) == (self.name == "eval")


def read_documents(
    source: Source, rows: Iterator[Place], streams: int, split: Split, bad_rows: BadRowPolicy
) -> Iterator[Document]:
    """The documents of one stream from its cursor on, endlessly.

    Raises DataError for a bad row where the policy says so, and when the stream finds nothing it can use.
    """
    rejected, last_epoch = 0, None
    for place in rows:
        epoch = place.cursor.epoch
        last_epoch = epoch if last_epoch is None else last_epoch
        text = _text(source, place, bad_rows) if split.takes(source, place) else None
        if text is not None:
            yield Document(place.cursor, text, partial(source.where, place.part, place.row.position))
            rejected, last_epoch = 0, epoch
            continue
        rejected += 1
        idle = epoch - last_epoch
        if (idle >= 2 and rejected >= PATIENT_ROWS) or idle >= PATIENT_EPOCHS * streams:
            raise DataError(
                f"data.sources: {source.path} has no document for the {split.name} split in {rejected} rows "
                f"(eval_fraction={split.held_out}; bad rows: {dict(bad_rows.counts) or 'none'}); give more data, "
                f"another text_key, or another data.eval_fraction"
            )


def _text(source: Source, place: Place, bad_rows: BadRowPolicy) -> str | None:
    try:
        if place.row.fault is not None:
            raise place.row.fault
        return source.text(place.part, place.row)
    except BadRow as bad:
        bad_rows.handle(
            bad,
            place.row.value,
            where=partial(source.where, place.part, place.row.position),
            mark=partial(source.mark, place.part, place.row.position),
            first_epoch=place.cursor.epoch == 0,
        )
        return None
