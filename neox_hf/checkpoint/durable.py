"""Bytes that have reached the disk, and their sums."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from neox_hf.errors import CheckpointError

CHUNK_BYTES = 1 << 20
# hashlib releases the interpreter lock; more threads than this gain nothing on one disk.
HASHING_THREADS = 4


def sync_file(path: Path) -> None:
    """Wait until the file's bytes are on the disk."""
    _sync(path, os.O_RDONLY)


def sync_directory(path: Path) -> None:
    """Wait until the names in the directory are on the disk."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def allow_usual_readers(path: Path) -> None:
    """Give a file the permissions that its directory has, as the umask would have.

    safetensors makes its files readable by their owner alone since 0.8 (its issue 782).
    """
    path.chmod(path.parent.stat().st_mode & 0o666)


def write_durably(path: Path, data: bytes) -> None:
    """Write a whole file and wait until it is on the disk."""
    path.write_bytes(data)
    sync_file(path)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in chunks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_all(paths: list[Path]) -> list[str]:
    """Hex digests in the order of the paths; several files are read at once."""
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return list(pool.map(sha256_of, paths))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell the user what could not be written, and that nothing older was lost.

    Raises:
        CheckpointError: the disk is full, the directory is read-only, or the like.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {path}: {error}. Earlier checkpoints are untouched; free some space, or choose a writable "
            "train.output_dir, and resume"
        ) from error
