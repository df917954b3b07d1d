"""Local files by format: how each is cut into parts, read row by row, and spoken of in errors.

A *part* is what a stream can enter directly: a document, a span of bytes, a row group, a whole compressed file. It is
a pair of integers that only its own class interprets.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from neox_hf.data.bad_rows import BadRow, text_of_bytes, text_of_json, text_of_record
from neox_hf.data.lines import (
    BOM,
    DAMAGE,
    READ_BYTES,
    Row,
    compressed_rows,
    is_compressed,
    line_number,
    line_starts,
    long_line,
    open_bytes,
    plain_rows,
)
from neox_hf.data.settings import SourceSettings
from neox_hf.errors import DataError

FORMATS = (".jsonl", ".txt", ".parquet")
FINGERPRINT_BYTES = 4096


def fingerprint_of(path: Path) -> str:
    """Of the size and both ends of the file: reading all of it would take hours where it matters most."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(FINGERPRINT_BYTES)
        file.seek(max(0, size - FINGERPRINT_BYTES))
        return sha256(f"{size} ".encode() + head + file.read()).hexdigest()


class DataFile(ABC):
    """One local file. `sequential`: a part holds many rows and can only be read from its beginning."""

    sequential = False

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self.limit = limit

    @abstractmethod
    def parts(self, span_bytes: int | None) -> np.ndarray:
        """Int64 [parts, 2]. Lines are cut every `span_bytes` bytes, or one by one where it is None."""

    @abstractmethod
    def rows(self, start: int, stop: int, position: int | None) -> Iterator[Row]:
        """The rows of part (start, stop), from `position` on or from the beginning."""

    @abstractmethod
    def text(self, row: Row) -> str:
        """The document of a row without fault. Raises BadRow."""

    def where(self, start: int, position: int) -> str:
        """`file:line` of a row, for messages."""
        return f"{self.path}:{position + 1}"

    def place(self, start: int, position: int) -> int:
        """Names a row within the file, however the file is cut into parts."""
        return position

    def fingerprint(self) -> str:
        return fingerprint_of(self.path)


class TextFile(DataFile):
    """The whole file is one document."""

    def parts(self, span_bytes: int | None) -> np.ndarray:
        return np.zeros((1, 2), np.int64)

    def rows(self, start: int, stop: int, position: int | None) -> Iterator[Row]:
        yield Row(0, self.path)  # read by `text`, once somebody wants this document

    def text(self, row: Row) -> str:
        try:
            with open_bytes(self.path) as file:
                raw = file.read(self.limit + 1)
        except DAMAGE as error:
            raise BadRow("damaged_file", f"the file is damaged or cut off: {error}") from None
        if len(raw) > self.limit:
            raise BadRow("long_line", f"{long_line(self.limit).detail}; a .txt is one document unless sample_by=line")
        return text_of_bytes(raw.removeprefix(BOM).replace(b"\r\n", b"\n"))


class LinesFile(DataFile):
    """Each line is a document. `parse` turns its bytes into text."""

    def __init__(self, path: Path, limit: int, parse: Callable[[bytes], str]) -> None:
        super().__init__(path, limit)
        self.parse = parse

    def text(self, row: Row) -> str:
        return self.parse(row.value)


class PlainLines(LinesFile):
    """Uncompressed lines: any byte offset is a place to start, so no index of a large file is needed."""

    def parts(self, span_bytes: int | None) -> np.ndarray:
        size = self.path.stat().st_size
        starts = line_starts(self.path) if span_bytes is None else np.arange(0, size, span_bytes)
        return np.stack([starts, np.append(starts[1:], size)], axis=1)

    def rows(self, start: int, stop: int, position: int | None) -> Iterator[Row]:
        return plain_rows(self.path, start if position is None else position, stop, self.limit)

    def where(self, start: int, position: int) -> str:
        return f"{self.path}:{line_number(self.path, position)}"


class CompressedLines(LinesFile):
    """Compressed lines: to get anywhere one reads from the beginning."""

    sequential = True

    def parts(self, span_bytes: int | None) -> np.ndarray:
        return np.zeros((1, 2), np.int64)

    def rows(self, start: int, stop: int, position: int | None) -> Iterator[Row]:
        return compressed_rows(self.path, position or 0, self.limit)


class ParquetFile(DataFile):
    """Each row is a document; a part is a row group."""

    sequential = True
    rows_at_once = 64

    def __init__(self, path: Path, limit: int, key: str) -> None:
        super().__init__(path, limit)
        self.key = key

    def parts(self, span_bytes: int | None) -> np.ndarray:
        groups = np.arange(self._open().num_row_groups)
        return np.stack([groups, groups + 1], axis=1)

    def rows(self, start: int, stop: int, position: int | None) -> Iterator[Row]:
        file = self._open()
        known = self.key in file.schema_arrow.names
        number, first = 0, position or 0
        columns = [self.key] if known else None
        try:
            for batch in file.iter_batches(self.rows_at_once, row_groups=[start], columns=columns):
                if number + batch.num_rows > first:
                    for offset, value in enumerate(_values(batch.column(self.key)) if known else batch.to_pylist()):
                        if number + offset >= first:
                            yield Row(number + offset, {self.key: value} if known else value)
                number += batch.num_rows
        except (OSError, pyarrow.ArrowException) as error:
            yield Row(max(number, first), b"", BadRow("damaged_file", f"row group {start} is damaged: {error}"))

    def text(self, row: Row) -> str:
        value = row.value.get(self.key)
        return text_of_bytes(value) if isinstance(value, bytes) else text_of_record(row.value, self.key)

    def where(self, start: int, position: int) -> str:
        metadata = self._open().metadata
        return f"{self.path}:{sum(metadata.row_group(group).num_rows for group in range(start)) + position + 1}"

    def place(self, start: int, position: int) -> int:
        return (start << 40) + position

    def _open(self) -> pyarrow.parquet.ParquetFile:
        try:
            # Without a buffer size a whole column of the row group would be read at once, for every stream.
            return pyarrow.parquet.ParquetFile(self.path, buffer_size=READ_BYTES)
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{self.path}: damaged_file: not a readable parquet file: {error}") from error


def _values(column: pyarrow.Array) -> list[object]:
    """Python values; where a string is not UTF-8, the column's raw bytes, so that only that row is a bad one."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast(pyarrow.binary()).to_pylist()


def format_of(path: Path) -> str | None:
    """`.jsonl`, `.txt`, `.parquet`, or None for a file that is not data."""
    suffix = path.with_suffix("").suffix if is_compressed(path) else path.suffix
    return suffix if suffix in FORMATS else None


def open_file(path: Path, settings: SourceSettings, limit: int) -> DataFile:
    """The DataFile for a path whose `format_of` is known; anything else is read as one text (the `stdlib` source)."""
    kind = format_of(path)
    if kind == ".parquet":
        return ParquetFile(path, limit, settings.text_key)
    if kind == ".jsonl":
        key = settings.text_key
        return (CompressedLines if is_compressed(path) else PlainLines)(
            path, limit, lambda line: text_of_json(line, key)
        )
    if kind == ".txt" and settings.sample_by == "line":
        return (CompressedLines if is_compressed(path) else PlainLines)(path, limit, text_of_bytes)
    return TextFile(path, limit)
