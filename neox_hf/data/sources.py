"""Sources of documents: a source is a numbered list of parts, and a part is a list of rows."""

import logging
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from glob import glob, has_magic
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import numpy as np

from neox_hf.data.bad_rows import BadRow, BadRowPolicy
from neox_hf.data.files import FORMATS, DataFile, PlainLines, format_of, open_file
from neox_hf.data.lines import Row, is_compressed
from neox_hf.data.settings import SourceSettings
from neox_hf.errors import DataError

logger = logging.getLogger(__name__)

# Below this many bytes of lines every line is a part of its own, and the shuffle is one of single documents.
INDEXED_BYTES = 256 * 1024 * 1024
SPANS_PER_STREAM = 16
LEAST_SPAN_BYTES, MOST_SPAN_BYTES = 64 * 1024, 1024 * 1024

UNEVEN = 3
"""Times the mean, of a file that is a share; see `assignment.OwnedParts`."""

# A data state names up to this many files; it must stay small.
MOST_NAMED_FILES = 100

QUICKLY_COUNTED_BYTES = 1024 * 1024

NOT_CORPUS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


class Source(Protocol):
    """parts: how many there are. sequential_parts: how many hold many rows and are read from their beginning.

    rows: of a part, from a row's position on. text: of a row without fault; raises BadRow. key: names a document for
    the choice of the held-out ones. where: "file:line", for errors. mark: the same, at no cost, for records.
    """

    path: str
    parts: int
    sequential_parts: int

    def rows(self, part: int, position: int | None) -> Iterator[Row]: ...
    def text(self, part: int, row: Row) -> str: ...
    def key(self, part: int, position: int) -> tuple[int, int]: ...
    def where(self, part: int, position: int) -> str: ...
    def mark(self, part: int, position: int) -> str: ...
    def fingerprint(self) -> dict[str, str]: ...


class FileSource:
    """Local files in sorted order.

    Memory: 20 bytes a part. A part of lines is one line where the source has up to INDEXED_BYTES of them
    (uncompressed), else a span of LEAST_SPAN_BYTES to MOST_SPAN_BYTES, so a source of 1 TB keeps 20 MB.
    """

    def __init__(self, path: str, files: Sequence[tuple[str, DataFile]], streams: int) -> None:
        """`files`: names that do not depend on where the data lies, and the files."""
        self.path = path
        self._files = list(files)
        span_bytes = _span_bytes([file.path for _, file in files if not file.sequential], streams)
        parts = [file.parts(span_bytes) for _, file in files]
        self._spans = np.concatenate([np.empty((0, 2), np.int64), *parts])
        self._file_of = np.repeat(np.arange(len(parts), dtype=np.int32), [len(spans) for spans in parts])
        self.parts = len(self._spans)
        shares = {file.path: len(spans) for (_, file), spans in zip(files, parts, strict=True) if file.sequential}
        self.sequential_parts = sum(shares.values())
        if self.sequential_parts >= streams:
            _warn_of_uneven(shares, path)

    def rows(self, part: int, position: int | None) -> Iterator[Row]:
        """Raises DataError where the file can no longer be read."""
        start, stop = map(int, self._spans[part])
        file = self._file(part)
        with _to_be_read(file.path):
            yield from file.rows(start, stop, position)

    def text(self, part: int, row: Row) -> str:
        """Raises DataError where the file can no longer be read."""
        file = self._file(part)
        with _to_be_read(file.path):
            return file.text(row)

    def key(self, part: int, position: int) -> tuple[int, int]:
        """Names a document by file and place, however lines are cut into parts."""
        return int(self._file_of[part]), self._file(part).place(int(self._spans[part, 0]), position)

    def where(self, part: int, position: int) -> str:
        """ "file:line". Reads the file up to there where lines are not counted on the way."""
        return self._file(part).where(int(self._spans[part, 0]), position)

    def mark(self, part: int, position: int) -> str:
        """As `where`, but a byte offset in place of a line that would take long to count."""
        if isinstance(self._file(part), PlainLines) and position > QUICKLY_COUNTED_BYTES:
            return f"{self._file(part).path} at byte {position}"
        return self.where(part, position)

    def fingerprint(self) -> dict[str, str]:
        """Of each file by name; of many files, one of all."""
        prints = {name: file.fingerprint() for name, file in self._files}
        if len(prints) <= MOST_NAMED_FILES:
            return prints
        return {"files": str(len(prints)), "digest": sha256(repr(sorted(prints.items())).encode()).hexdigest()}

    def _file(self, part: int) -> DataFile:
        return self._files[self._file_of[part]][1]


@contextmanager
def _to_be_read(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read any more: {error}") from error


def _warn_of_uneven(shares: Mapping[Path, int], source: str) -> None:
    """shares: how many each file has. Each is one stream's, and streams take equally many samples of a source."""
    sizes = {path: path.stat().st_size / count for path, count in shares.items() if count}
    largest, mean = max(sizes, key=sizes.__getitem__), sum(sizes.values()) / len(sizes)
    if sizes[largest] > UNEVEN * mean:
        logger.warning(
            "data.sources: %s: what is read from its beginning is dealt to the streams whole, and that of %s is %.0f "
            "times as large as the mean: its documents will be read less often than others; split it, or give it as "
            "a source of its own",
            source,
            largest,
            sizes[largest] / mean,
        )


def _span_bytes(paths: Sequence[Path], streams: int) -> int | None:
    total = sum(path.stat().st_size for path in paths)
    if total <= INDEXED_BYTES:
        return None
    return max(LEAST_SPAN_BYTES, min(MOST_SPAN_BYTES, total // (SPANS_PER_STREAM * streams)))


def open_source(settings: SourceSettings, *, streams: int, limit: int, bad_rows: BadRowPolicy) -> Source:
    """The source that `settings.path` names. Raises DataError when there is nothing to read."""
    if settings.weight <= 0:
        raise DataError(f"data.sources: weight={settings.weight} of {settings.path} must be greater than 0")
    if settings.path.startswith("hub:"):
        from neox_hf.data.hub_source import HubSource

        return HubSource(settings)
    if settings.path == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        names = _corpus_names(root)
    else:
        root, names = _list_files(settings.path)
    files = []
    for name in names:
        path = root / name
        if path.stat().st_size:
            files.append((name, open_file(path, settings, limit)))
        elif settings.path != "stdlib":  # an empty __init__.py is nothing to complain of
            place = partial(str, f"{path}:1")
            bad_rows.handle(BadRow("empty_file", "the file has no bytes"), b"", where=place, mark=place)
    source = FileSource(settings.path, files, streams)
    if source.parts == 0:
        raise DataError(f"data.sources: {settings.path} holds no document: its {len(names)} file(s) are all empty")
    return source


def _corpus_names(root: Path) -> list[str]:
    """The interpreter's own .py files, tests and installed packages left out."""
    names = []
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in NOT_CORPUS]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return sorted(names)


def _list_files(pattern: str) -> tuple[Path, list[str]]:
    """A common root and the sorted names below it of the data files of a path, folder or glob."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = [file for file in _files_below(path) if file.is_file() and not _is_hidden(file.relative_to(path))]
        root, files = path, [file for file in found if format_of(file)]
    elif path.is_file():
        root, files = path.parent, [path]
    elif has_magic(pattern):
        files = [Path(name) for name in glob(str(path), recursive=True) if Path(name).is_file()]
        root = Path(*(part for part in _fixed_parts(path)))
    else:
        raise DataError(
            f"data.sources: {pattern} does not exist; wanted `stdlib`, `hub:owner/name`, or a file, folder or glob of "
            f"{', '.join(FORMATS)}, plain or compressed as .gz or .zst"
        )
    return root, sorted(_readable(pattern, file).relative_to(root).as_posix() for file in _some(pattern, files))


def _files_below(folder: Path) -> Iterator[Path]:
    """Those of linked folders, too, each folder once."""
    seen = set()
    for place, inner, names in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inner.sort()
        yield from (Path(place, name) for name in names)


def _some(pattern: str, files: list[Path]) -> list[Path]:
    if not files:
        raise DataError(
            f"data.sources: {pattern} matches no file of {', '.join(FORMATS)}, plain or compressed as .gz or .zst"
        )
    return files


def _readable(pattern: str, path: Path) -> Path:
    kind = format_of(path)
    if kind is None or (kind == ".parquet" and is_compressed(path)):
        raise DataError(
            f"data.sources: {path} (of {pattern}) is of no known format; wanted {', '.join(FORMATS)}; "
            f".jsonl and .txt also with .gz or .zst"
        )
    return path


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _fixed_parts(pattern: Path) -> Iterator[str]:
    """The leading folders of a glob, up to the first that holds a wildcard."""
    for part in pattern.parts[:-1]:
        if has_magic(part):
            return
        yield part
