"""Which checkpoint a run starts from, decided and verified once for all ranks."""

import logging
from pathlib import Path

from neox_hf.checkpoint import Checkpoint, Manifest, find_latest, open_checkpoint, read_manifest, verify_checkpoint
from neox_hf.checkpoint.directory import finished_checkpoints, step_of
from neox_hf.errors import CheckpointError
from neox_hf.parallel.collectives import from_first_rank
from neox_hf.parallel.topology import Topology

logger = logging.getLogger(__name__)

LATEST = "latest"


def checkpoint_to_resume(request: str | bool | None, output_dir: Path, topology: Topology) -> Checkpoint | None:
    """The verified checkpoint that `request` stands for; None to start afresh.

    Args:
        request: `latest` or True for the newest whole checkpoint of `output_dir`, a directory, or None or False.

    Raises:
        CheckpointError: on every rank, when the named checkpoint is missing or damaged.
    """
    found = from_first_rank(topology, lambda: _decide(request, output_dir))
    return None if found is None else open_checkpoint(found[0], verified=found[1])


def open_on_all_ranks(path: Path, topology: Topology) -> Checkpoint:
    """The checkpoint at `path`, which rank 0 has verified for all.

    Raises:
        CheckpointError: on every rank, when it is missing or damaged.
    """
    manifest = from_first_rank(topology, lambda: verify_checkpoint(path))
    return open_checkpoint(path, verified=manifest)


def _decide(request: str | bool | None, output_dir: Path) -> tuple[Path, Manifest] | None:
    if not request:
        return None
    if request in (True, LATEST):
        return _newest(output_dir)
    path = Path(str(request))
    _refuse_two_timelines(path, read_manifest(path).step, output_dir)
    return path, verify_checkpoint(path)


def _refuse_two_timelines(request: Path, step: int, output_dir: Path) -> None:
    """Later checkpoints of an abandoned continuation would be taken for this run's newest."""
    newer = [path for path in finished_checkpoints(output_dir) if step_of(path) > step]
    if newer:
        raise CheckpointError(
            f"{output_dir} holds {newer[0].name}, which is newer than {request.name}, the one to resume from: the two "
            "continuations would mix. Move the newer ones away, or choose another train.output_dir"
        )


def _newest(output_dir: Path) -> tuple[Path, Manifest] | None:
    found = find_latest(output_dir)
    if found.path is None:
        logger.warning("no valid checkpoint in %s: starting from the beginning", output_dir)
        return None
    logger.warning("resuming from %s", found.path)
    return found.path, found.manifest
