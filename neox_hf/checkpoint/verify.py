"""Is this checkpoint what was written? And which is the newest that is?"""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NoReturn

from neox_hf.checkpoint.directory import MANIFEST, finished_checkpoints
from neox_hf.checkpoint.durable import sha256_of_all
from neox_hf.checkpoint.manifest import FileRecord, Manifest
from neox_hf.errors import CheckpointError

logger = logging.getLogger(__name__)

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# A loader picks such files up by their names, whether the manifest knows them or not.
WEIGHTS = (".safetensors", ".safetensors.index.json")


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of a checkpoint directory, whose files are not looked at.

    Raises:
        CheckpointError: it is missing, damaged, or names a file outside the directory.
    """
    file = Path(path) / MANIFEST
    try:
        manifest = Manifest.from_bytes(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: {path} is not a finished checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{file} is damaged: {error}; resume from another checkpoint") from error
    for record in manifest.files:
        if not is_safe(record.path):
            raise CheckpointError(f"{file} names {record.path!r}, which is not a path inside the checkpoint")
    return manifest


def verify_checkpoint(path: str | os.PathLike[str]) -> Manifest:
    """Read every file of a checkpoint and compare it with the manifest.

    Raises:
        CheckpointError: names the first file that is missing, differs in size or sha256, is a link or a pickle, or is
            a weights file that the manifest does not know.
    """
    path = Path(path)
    manifest = read_manifest(path)
    _check_strangers(path, manifest.paths())
    for record in manifest.files:
        _check_size(path, record)
    try:
        sums = sha256_of_all([path / record.path for record in manifest.files])
    except OSError as error:
        _refuse(error)
    for record, found in zip(manifest.files, sums, strict=True):
        if found != record.sha256:
            raise CheckpointError(
                f"{path / record.path} is damaged: its sha256 is {found}, it was written with {record.sha256}; "
                "resume from another checkpoint"
            )
    return manifest


def is_safe(relative: str) -> bool:
    """Is this a plain relative path with slashes, which cannot leave its directory?"""
    parts = PurePosixPath(relative).parts
    return (
        bool(parts)
        and "\\" not in relative
        and "\0" not in relative
        and ".." not in parts
        and not relative.startswith("/")
        and "/".join(parts) == relative
    )


def _check_strangers(root: Path, known: set[str]) -> None:
    for folder, folders, files in os.walk(root, onerror=_refuse):
        for name in [*folders, *files]:
            path = Path(folder, name)
            if path.is_symlink():
                raise CheckpointError(f"{path} is a symbolic link to {os.readlink(path)}; a checkpoint holds none")
        for name in files:
            path = Path(folder, name)
            if name.endswith(PICKLES):
                raise CheckpointError(f"{path} may be a pickle, which runs code when it is loaded; remove it")
            if name.endswith(WEIGHTS) and path.relative_to(root).as_posix() not in known:
                raise CheckpointError(f"{path} is not in the manifest; remove it: a loader could take it for ours")


def _refuse(error: OSError) -> NoReturn:
    raise CheckpointError(f"cannot read {error.filename}: {error}") from error


def _check_size(root: Path, record: FileRecord) -> None:
    file = root / record.path
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; resume from another checkpoint")
    size = file.stat().st_size
    if size != record.size:
        raise CheckpointError(
            f"{file} has {size} bytes, it was written with {record.size}; resume from another checkpoint"
        )


@dataclass(frozen=True)
class Found:
    """The newest valid checkpoint of an output directory, and the newer ones that are not, each with the reason."""

    path: Path | None = None
    passed_over: list[tuple[Path, str]] = field(default_factory=list)
    manifest: Manifest | None = None


def find_latest(output_dir: str | os.PathLike[str]) -> Found:
    """Verify the checkpoints of `output_dir`, newest first, until one is valid."""
    passed_over: list[tuple[Path, str]] = []
    for path in finished_checkpoints(Path(output_dir)):
        outcome = _manifest_or_reason(path)
        if isinstance(outcome, Manifest):
            return Found(path, passed_over, outcome)
        logger.warning("passed over %s: %s", path, outcome)
        passed_over.append((path, outcome))
    return Found(None, passed_over)


def _manifest_or_reason(path: Path) -> Manifest | str:
    try:
        return verify_checkpoint(path)
    except CheckpointError as error:
        return str(error)
