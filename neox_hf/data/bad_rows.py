"""Rows that cannot be used: their classes, and what a run does about them."""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from neox_hf.errors import DataError

KINDS = (
    "broken_json",
    "not_an_object",
    "missing_key",
    "null_text",
    "not_a_string",
    "empty_text",
    "invalid_utf8",
    "long_line",
    "empty_file",
    "damaged_file",
)


class BadRow(Exception):
    """One unusable row. `kind` is one of KINDS, `detail` says what was found and what was wanted."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


Policy = Literal["error", "skip", "quarantine"]


class BadRowPolicy:
    """Applies `data.bad_rows`: stop with a DataError, or drop the row and count it, or also keep a copy of it.

    counts: rows by class as this process has read them, read-ahead included. Only the first epoch counts (and only
        there is a row quarantined), so that a row is not counted again each time the data is repeated.
    quarantine: a jsonl file that gets one line {"where", "kind", "detail", "row"} for each dropped row; a row that
        had been read ahead when a run stopped appears again after its resumption.
    """

    def __init__(self, policy: Policy, quarantine: Path) -> None:
        self.policy = policy
        self.quarantine = quarantine
        self.counts: Counter[str] = Counter()

    def handle(
        self, bad: BadRow, raw: object, *, where: Callable[[], str], mark: Callable[[], str], first_epoch: bool = True
    ) -> None:
        """Raises DataError under the policy `error`; otherwise returns and the caller drops the row.

        where: gives "file:line"; called for an error only, since counting the lines of a large file takes long.
        mark: gives the place in a way that costs nothing.
        """
        if self.policy == "error":
            raise DataError(
                f"{where()}: {bad.kind}: {bad.detail}. Mend the row, or set data.bad_rows to `skip` or `quarantine` "
                f"to go on without it"
            )
        if not first_epoch:
            return
        self.counts[bad.kind] += 1
        if self.policy == "quarantine":
            self._keep({"where": mark(), "kind": bad.kind, "detail": bad.detail, "row": _printable(raw)})

    def _keep(self, record: dict[str, str]) -> None:
        """One write call on a file opened for appending, so that lines of several processes do not mix."""
        self.quarantine.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.quarantine, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (json.dumps(record) + "\n").encode())
        finally:
            os.close(descriptor)


def without_copies(policy: Policy) -> Policy:
    """The policy for a reader of rows that another one keeps copies of."""
    return "error" if policy == "error" else "skip"


def _printable(raw: object) -> str:
    if isinstance(raw, bytes):
        return raw.decode("utf-8", errors="backslashreplace")
    return raw if isinstance(raw, str) else repr(raw)


def text_of_json(line: bytes, key: str) -> str:
    """The text of one jsonl line. Raises BadRow."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise BadRow("invalid_utf8", f"the line is not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise BadRow("broken_json", f"the line is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadRow("not_an_object", f'wanted an object with the key "{key}", found {type(record).__name__}')
    return text_of_record(record, key)


def text_of_record(record: dict[str, object], key: str) -> str:
    """The text of one row that has columns. Raises BadRow."""
    if key not in record:
        raise BadRow("missing_key", f'no key "{key}" (data.sources text_key); the row has {sorted(map(str, record))}')
    return checked_text(record[key], key)


def text_of_bytes(raw: bytes) -> str:
    """The text of one line or file of plain text. Raises BadRow."""
    try:
        return checked_text(raw.decode("utf-8"), "text")
    except UnicodeDecodeError as error:
        raise BadRow("invalid_utf8", f"the text is not UTF-8: {error}") from None


def checked_text(value: object, key: str) -> str:
    """`value` when it is text that can be tokenized. Raises BadRow."""
    if value is None:
        raise BadRow("null_text", f'"{key}" is null, wanted a string')
    if not isinstance(value, str):
        raise BadRow("not_a_string", f'"{key}" is {type(value).__name__}, wanted a string')
    if not value or value.isspace():
        raise BadRow("empty_text", f'"{key}" is empty')
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            # JSON may spell half of a surrogate pair; no tokenizer takes it.
            raise BadRow("invalid_utf8", f'"{key}" is not valid Unicode: {error}') from None
    return value
