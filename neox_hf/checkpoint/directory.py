"""Names inside an output directory, and what a writer that was killed may have left there.

`checkpoint-N` is complete from the moment it has its name. `tmp-...` is work in progress. `old-checkpoint-N` is a
complete checkpoint that was moved aside while another of the same step took its place.
"""

import logging
import os
import re
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state"

_FINISHED = re.compile(r"(?:old-)?checkpoint-(\d+)")
_UNFINISHED = re.compile(r"tmp-(?:(?:removed-)?checkpoint-\d+|final)")


def finished_path(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step}"


def unfinished_path(output_dir: Path, step: int) -> Path:
    return output_dir / f"tmp-checkpoint-{step}"


def final_path(output_dir: Path) -> Path:
    """Where the final model is put together."""
    return output_dir / "tmp-final"


def aside_path(output_dir: Path, step: int) -> Path:
    return output_dir / f"old-checkpoint-{step}"


def rank_file(stem: str, rank: int, world_size: int) -> str:
    """Where one rank's part of `stem` lies in a checkpoint."""
    return f"{STATE}/{stem}-{rank}-of-{world_size}.safetensors"


def step_of(path: Path) -> int | None:
    """The step in the name of a finished checkpoint, moved aside or not; None for any other name."""
    match = _FINISHED.fullmatch(path.name)
    return int(match.group(1)) if match else None


def finished_checkpoints(output_dir: Path) -> list[Path]:
    """Directories with the name of a finished checkpoint, newest first, those moved aside after their successors."""
    if not output_dir.is_dir():
        return []
    paths = [path for path in output_dir.iterdir() if step_of(path) is not None and path.is_dir()]
    return sorted(paths, key=lambda path: (-step_of(path), path.name.startswith("old-")))


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint so that no half of it is ever seen under its name."""
    doomed = path.with_name(f"tmp-removed-checkpoint-{step_of(path)}")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def recover(output_dir: Path) -> None:
    """Remove unfinished work and put a checkpoint that was moved aside back, unless its successor is in place.

    Call it only where no other process writes: on rank 0, which holds the output directory's lock.
    """
    for path in finished_checkpoints(output_dir):
        if path.name.startswith("old-"):
            successor = finished_path(output_dir, step_of(path))
            if successor.exists():
                remove_checkpoint(path)
            else:
                os.rename(path, successor)
                logger.warning("put %s back: the checkpoint that was to replace it was never finished", successor)
    for path in output_dir.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path)
            logger.warning("removed %s, which was never finished", path)
