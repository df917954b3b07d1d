"""What a checkpoint consists of: `manifest.json`, written last and guarded by a sum of its own."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from neox_hf.errors import CheckpointError

VERSION = 1


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint: path relative to its directory, with slashes; size in bytes; hex digest."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A checkpoint's contents.

    step: optimizer steps done. world_size: processes that wrote. metadata: the trainer's own facts, such as samples
    and tokens consumed. versions: of the libraries that wrote it.
    """

    step: int
    world_size: int
    metadata: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: tuple[FileRecord, ...] = ()
    version: int = VERSION

    def paths(self) -> set[str]:
        return {record.path for record in self.files}

    def to_bytes(self) -> bytes:
        """The text of `manifest.json`; equal manifests give equal bytes."""
        body = asdict(self)
        return _text({**body, "sha256": hashlib.sha256(_text(body)).hexdigest()})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Read the text back.

        Raises:
            CheckpointError: it is empty, not ours, of an unknown version, or differs in any byte from what was written.
        """
        try:
            body = json.loads(data)
        except ValueError as error:
            raise CheckpointError(f"{len(data)} bytes that are not JSON ({error})") from error
        if not isinstance(body, dict) or "sha256" not in body:
            raise CheckpointError("it holds no sha256 of its own")
        if body.get("version") != VERSION:
            raise CheckpointError(f"its version is {body.get('version')!r}; this neox_hf reads version {VERSION}")
        written = body.pop("sha256")
        found = hashlib.sha256(_text(body)).hexdigest()
        # The text is canonical, so that a change which leaves the values alone is seen as well.
        if written != found or data != _text({**body, "sha256": written}):
            raise CheckpointError(f"its content has sha256 {found}, it was written with {written}")
        try:
            files = tuple(FileRecord(**record) for record in body.pop("files"))
            return cls(**body, files=files)
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"its fields are not those of version {VERSION}: {error}") from error


def _text(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()
