"""Lines of plain and compressed files, read in bounded memory."""

import gzip
import io
import resource
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import zstandard

from neox_hf.data.bad_rows import BadRow
from neox_hf.errors import DataError

READ_BYTES = 64 * 1024
MOST_READ_BYTES = 8 * 1024 * 1024
OTHER_OPEN_FILES = 512
BOM = b"\xef\xbb\xbf"
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)


class Row(NamedTuple):
    """One row as its file holds it.

    position: what brings a reader back to it: a byte offset in a plain file, else a row number. value: what the
    file's `text` takes.
    fault: set when the row could not be read; `value` then holds what there was.
    """

    position: int
    value: object
    fault: BadRow | None = None


def is_compressed(path: Path) -> bool:
    return path.suffix in (".gz", ".zst")


def open_bytes(path: Path) -> BinaryIO:
    """The uncompressed bytes of a file, by its suffix. Reading a truncated file raises one of DAMAGE."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(path.open("rb")), READ_BYTES)
    return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """zstandard's own reader takes the end of a truncated file for the end of its data; this one raises EOFError."""

    def __init__(self, compressed: BinaryIO) -> None:
        self._compressed = compressed
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame = self._decompressor.decompressobj()
        self._inside_frame = False
        self._ready = b""
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:
        while not self._ready:
            block = self._left or self._compressed.read(READ_BYTES)
            self._left = b""
            if not block:
                if self._inside_frame:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self._ready = self._frame.decompress(block)
            self._inside_frame = not self._frame.eof
            if self._frame.eof:
                self._left = self._frame.unused_data
                self._frame = self._decompressor.decompressobj()
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._compressed.close()
        super().close()


def allow_open_files(count: int) -> None:
    """Lets this process hold `count` files open beside what it has. Raises DataError where the system forbids it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_OPEN_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise DataError(
                f"{count} streams each read a compressed or parquet file, but this process may open only {hard} files; "
                f"raise `ulimit -n`, use more data ranks or data.workers, or fewer data.streams"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def long_line(limit: int) -> BadRow:
    return BadRow("long_line", f"the line has more than data.max_line_bytes={limit} bytes")


def _chunks(path: Path, offset: int) -> Iterator[bytes]:
    """Reads on from `offset`, in steps that grow.

    The file is closed between reads: a process may follow a thousand streams.
    """
    size = READ_BYTES
    while True:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            chunk = file.read(size)
        if not chunk:
            return
        yield chunk
        offset += len(chunk)
        # Lines end well within a chunk, as a rule; where they do not, longer reads keep joining them linear in time.
        size = READ_BYTES if b"\n" in chunk else min(2 * size, MOST_READ_BYTES)


def plain_rows(path: Path, start: int, stop: int, limit: int) -> Iterator[Row]:
    """The lines, but blank ones, that begin in bytes [start, stop) of a plain file; positions are byte offsets."""
    # A line begins at `start` only if the byte before it ends one, so reading begins there and drops what ends first.
    line_start, dropping = (start - 1, True) if start else (0, False)
    tail = b""
    for chunk in _chunks(path, line_start):
        lines = (tail + chunk).split(b"\n")
        tail = lines.pop()
        for line in lines:
            if line_start >= stop:
                return
            if not dropping:
                yield from _row(line_start, line, limit, first=line_start == 0)
            line_start += len(line) + 1
            dropping = False
        if line_start >= stop:
            return
        if len(tail) > limit and not dropping:
            yield Row(line_start, b"", long_line(limit))
            dropping = True
        if dropping:
            line_start += len(tail)
            tail = b""
    if tail and line_start < stop:
        yield from _row(line_start, tail, limit, first=line_start == 0)


def _row(position: int, line: bytes, limit: int, *, first: bool) -> Iterator[Row]:
    line = (line.removeprefix(BOM) if first else line).removesuffix(b"\r")
    if len(line) > limit:
        yield Row(position, b"", long_line(limit))
    elif line and not line.isspace():
        yield Row(position, line)


def compressed_rows(path: Path, start: int, limit: int) -> Iterator[Row]:
    """The lines of a compressed file from line number `start` on; positions are line numbers counted from 0."""
    number = 0
    try:
        with open_bytes(path) as file:
            while line := file.readline(limit + 2):
                too_long = len(line) == limit + 2 and not line.endswith(b"\n")
                while too_long and line and not line.endswith(b"\n"):
                    line = file.readline(MOST_READ_BYTES)
                if too_long and number >= start:
                    yield Row(number, b"", long_line(limit))
                elif number >= start:
                    yield from _row(number, line.removesuffix(b"\n"), limit, first=number == 0)
                number += 1
    except DAMAGE as error:
        yield Row(max(number, start), b"", BadRow("damaged_file", f"the file is damaged or cut off: {error}"))
        return
    if number == 0:
        yield Row(0, b"", BadRow("empty_file", "the file holds no line"))


def line_starts(path: Path) -> np.ndarray:
    """Byte offsets int64 [lines] of every line of an uncompressed file."""
    starts, offset, size = [np.zeros(1, np.int64)], 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(MOST_READ_BYTES):
            starts.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + offset + 1)
            offset += len(chunk)
    every = np.concatenate(starts)
    return every[every < size]


def line_number(path: Path, offset: int) -> int:
    """The number, counted from 1, of the line of an uncompressed file that begins at byte `offset`."""
    newlines = 0
    with path.open("rb") as file:
        while offset > 0 and (chunk := file.read(min(offset, MOST_READ_BYTES))):
            newlines += chunk.count(b"\n")
            offset -= len(chunk)
    return newlines + 1
