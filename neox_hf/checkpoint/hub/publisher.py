"""What the trainer calls to publish: queue a checkpoint and go on; at the end, ask what happened."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from neox_hf.checkpoint.hub.queue import Destination, PushQueue
from neox_hf.checkpoint.hub.report import PublishReport
from neox_hf.checkpoint.settings import HubSettings
from neox_hf.errors import CheckpointError, RecipeError

logger = logging.getLogger(__name__)


class HubPublisher:
    """Publishes the checkpoints of one run. For the one process that writes them (rank 0).

    Nothing here waits for the network but `close`, and no fault of the network or of the queue's disk is raised:
    it is logged when it happens and reported by `close`. What a run before this one left in the queue is pushed first.
    Raises RecipeError when the settings name no repository.
    """

    def __init__(self, settings: HubSettings, output_dir: Path) -> None:
        if settings.repo_id is None:
            raise RecipeError("publishing needs a repository; set hub.repo_id=owner/name")
        # Here and not above: importing checkpoint code should not import the Hub's client.
        from neox_hf.checkpoint.hub.worker import PushWorker

        self._repo_id, self._private = settings.repo_id, settings.private
        self._queue = PushQueue(Path(output_dir))
        self._worker = PushWorker(self._queue, settings)
        self._not_queued: list[tuple[str, str]] = []
        if self._queue.entries():
            self._worker.wake()

    def publish_step(self, checkpoint_dir: Path, step: int) -> None:
        """Queue a finished checkpoint as revision `step<N>`. It may be deleted as soon as this returns."""
        self._add(f"step{step}", Path(checkpoint_dir), f"Step {step}")

    def publish_final(self, folder: Path, files: Mapping[str, str] | None = None) -> None:
        """Queue the final model for `main`. files: texts by name, such as README.md, instead of the folder's own."""
        self._add("main", Path(folder), "Final model", files)

    def close(self, timeout: float | None = None) -> PublishReport:
        """Wait for the uploads, at most `timeout` seconds (None: until they succeed or their attempts are used up)."""
        outcome = self._worker.finish(timeout)
        return replace(outcome, pending=outcome.pending + self._not_queued)

    def _add(self, revision: str, folder: Path, title: str, texts: Mapping[str, str] | None = None) -> None:
        try:
            self._queue.add(revision, folder, Destination(self._repo_id, self._private, title), texts)
        except (OSError, CheckpointError) as error:
            logger.error("%s was not queued for the Hub: %s", revision, error)
            self._not_queued.append((revision, f"it was not queued: {error}"))
        else:
            self._worker.wake()
