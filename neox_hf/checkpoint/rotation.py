"""Which old checkpoints `save_total_limit` deletes."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from neox_hf.checkpoint.directory import finished_checkpoints, finished_path, remove_checkpoint, step_of
from neox_hf.checkpoint.verify import read_manifest
from neox_hf.errors import CheckpointError

logger = logging.getLogger(__name__)


def prune(
    output_dir: str | os.PathLike[str],
    keep_last: int,
    protected_steps: Callable[[int], bool],
    best: str | os.PathLike[str] | None = None,
    written: Path | None = None,
    newest: bool = True,
) -> list[Path]:
    """Delete old checkpoints and return their paths, oldest first.

    keep_last: how many to keep, the best one among them, as HF counts. Protected steps (a log-spaced schedule's) stay
        and are not counted. Zero or less keeps all.
    newest: whether that one stays in any case, for a run to go on from.
    written: the checkpoint just written, which is the newest whatever the steps of others say.
    A directory without a readable manifest is no checkpoint: it is neither counted nor deleted.
    """
    if keep_last <= 0:
        return []
    candidates = [
        path
        for path in finished_checkpoints(Path(output_dir))
        if path == finished_path(path.parent, step_of(path)) and not protected_steps(step_of(path)) and _is_ours(path)
    ]
    candidates.sort(key=lambda path: path != written)  # stable: the others stay in the order of their steps
    best_step = None if best is None else step_of(Path(best))
    others = [path for path in candidates if step_of(path) != best_step]
    room = keep_last - (len(candidates) - len(others))
    newest_is_other = bool(candidates) and step_of(candidates[0]) != best_step
    doomed = others[max(room, 1 if newest and newest_is_other else 0) :][::-1]
    for path in doomed:
        logger.info("deleting %s: save_total_limit is %d", path, keep_last)
        remove_checkpoint(path)
    return doomed


def _is_ours(path: Path) -> bool:
    try:
        read_manifest(path)
    except CheckpointError as error:
        logger.warning("left alone: %s", error)
        return False
    return True
