"""The queue on disk of what is to be pushed: it outlives the checkpoints that rotation deletes, and a crash.

`OUTPUT_DIR/.hub-queue/000007-step1000/` holds `ledger.json` (where it goes) and `files/`, what is pushed. Weights are
hard links, which take no time and no space and keep the bytes when a checkpoint is deleted or its files are replaced by
renaming. The small files are copies, since some of them, such as README.md, may be rewritten in place.
An entry is complete when its folder has its name; it is removed when it has been pushed.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from neox_hf.checkpoint.durable import write_durably
from neox_hf.checkpoint.hub.allow_list import allowed_files, is_allowed, is_weights
from neox_hf.errors import CheckpointError

FOLDER = ".hub-queue"
LEDGER = "ledger.json"
NAME = re.compile(r"(\d+)-(.+)")  # order, revision
ADDING, REMOVING = "adding-", "removing-"


@dataclass(frozen=True)
class Destination:
    """Where an entry goes, and the title of its commit."""

    repo_id: str
    private: bool
    title: str


@dataclass(frozen=True)
class Entry:
    """One queued revision. Its folder is named `<order>-<revision>`."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def revision(self) -> str:
        return self.name.split("-", 1)[1]

    @property
    def order(self) -> int:
        return int(self.name.split("-", 1)[0])

    @property
    def files(self) -> list[Path]:
        return allowed_files(self.path / "files")

    def destination(self) -> Destination:
        try:
            return Destination(**json.loads((self.path / LEDGER).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self.path / LEDGER} cannot be read ({error}); delete the folder {self.path}"
            ) from error


class PushQueue:
    """Entries in the order in which they were added."""

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / FOLDER

    def add(
        self, revision: str, folder: Path, destination: Destination, texts: Mapping[str, str] | None = None
    ) -> Entry:
        """Queue the allowed files of `folder`, and `texts` (name -> content) which take the place of files so named.

        Raises CheckpointError when there is nothing to load a model from, or a name of `texts` may not be pushed.
        """
        texts = texts or {}
        files = [path for path in allowed_files(folder) if path.name not in texts]
        if not any(is_weights(path.name) for path in files):
            raise CheckpointError(
                f"{folder} holds no *.safetensors file, so there is no model to publish as {revision}"
            )
        if refused := sorted(name for name in texts if not is_allowed(name)):
            raise CheckpointError(
                f"{', '.join(refused)} may not be published; allowed are config, weights, tokenizer, card"
            )
        self._clear(ADDING)
        order = max((entry.order for entry in self.entries()), default=0) + 1
        name = f"{order:06d}-{revision}"
        draft = self.path / (ADDING + name)
        (draft / "files").mkdir(parents=True)
        for path in files:
            _keep(path, draft / "files" / path.name)
        for text_name, content in texts.items():
            (draft / "files" / text_name).write_text(content, encoding="utf-8")
        write_durably(draft / LEDGER, json.dumps(asdict(destination)).encode())
        return Entry(draft.rename(self.path / name))

    def entries(self) -> list[Entry]:
        """Everything queued, oldest first. Of a revision queued twice only the newer counts."""
        if not self.path.is_dir():
            return []
        found = sorted((Entry(p) for p in self.path.iterdir() if NAME.fullmatch(p.name)), key=lambda entry: entry.order)
        newest = {entry.revision: entry for entry in found}
        return [entry for entry in found if newest[entry.revision] is entry]

    def remove(self, entry: Entry) -> None:
        """Drop `entry` and older entries of its revision. Renamed first, so that a half-deleted one is never seen."""
        for path in list(self.path.glob(f"*-{entry.revision}")):
            if NAME.fullmatch(path.name) and Entry(path).order <= entry.order:
                path.rename(self.path / (REMOVING + path.name))
        self._clear(REMOVING)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held during one push, so that two processes never push the same entry. Waits for its turn."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # a crash releases it
            try:
                yield
            finally:
                # Closing is not enough: a data loader worker forked meanwhile keeps the file open and so the lock held.
                fcntl.flock(file, fcntl.LOCK_UN)

    def _clear(self, prefix: str) -> None:
        """Delete what an interrupted `add` or `remove` left behind."""
        for path in list(self.path.glob(f"{prefix}*")):
            shutil.rmtree(path)


def _keep(source: Path, target: Path) -> None:
    """A hard link for weights, or a copy on a file system that has no links; a copy for all else."""
    if source.suffix != ".safetensors":
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
