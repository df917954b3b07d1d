"""Reading a checkpoint that has been verified."""

import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from neox_hf.checkpoint.box_files import BoxFiles, open_file
from neox_hf.checkpoint.directory import STATE, rank_file
from neox_hf.checkpoint.manifest import Manifest
from neox_hf.checkpoint.verify import verify_checkpoint
from neox_hf.checkpoint.weight_loading import load_weights
from neox_hf.checkpoint.weights import INDEX
from neox_hf.errors import CheckpointError
from neox_hf.parallel.collectives import together
from neox_hf.parallel.topology import Topology

MODEL_IN_STATE = re.compile(rf"{STATE}/model(-\d+-of-\d+)?\.safetensors")
"""The weights of a model whose adapters are what lies in the checkpoint for others."""


class Checkpoint:
    """A verified checkpoint directory. Only files that its manifest lists are opened."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._known = manifest.paths()

    def has(self, relative: str) -> bool:
        """Does the checkpoint hold this file?"""
        return relative in self._known

    def file(self, relative: str) -> Path:
        """Full path of a file that the manifest lists.

        Raises:
            CheckpointError: it lists no such file.
        """
        if relative not in self._known:
            raise CheckpointError(f"{self.path} holds no {relative}; it was written by a run with other settings")
        return self.path / relative

    def json(self, relative: str) -> Any:
        """Content of a JSON file."""
        return json.loads(self.file(relative).read_bytes())

    def boxes(self, stem: str) -> BoxFiles:
        """The boxes of `stem` that all ranks wrote.

        Raises:
            CheckpointError: no rank wrote any.
        """
        pattern = re.compile(rf"{STATE}/{re.escape(stem)}-\d+-of-\d+\.safetensors")
        paths = [self.path / name for name in sorted(self._known) if pattern.fullmatch(name)]
        if not paths:
            raise CheckpointError(f"{self.path} holds no {stem}; it was written by a run with other settings")
        return BoxFiles(paths)

    def tensors(self, stem: str, rank: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors, and the header's metadata, that one rank wrote under `stem` for itself."""
        handle: safe_open = open_file(self.file(rank_file(stem, rank, self.manifest.world_size)))
        return {key: handle.get_tensor(key) for key in handle.keys()}, handle.metadata() or {}  # noqa: SIM118

    def load_weights(self, model: PreTrainedModel, *, cast: bool = False, topology: Topology | None = None) -> None:
        """Fill what this rank holds of `model`, or change nothing; see `weight_loading.load_weights`."""
        files = together(topology or Topology.single(), self._weight_files)
        load_weights(model, files, cast=cast, topology=topology)

    def _weight_files(self) -> list[Path]:
        whole = sorted(name for name in self._known if MODEL_IN_STATE.fullmatch(name))
        if whole:
            return [self.path / name for name in whole]
        names = sorted(name for name in self._known if "/" not in name and name.endswith(".safetensors"))
        if self.has(INDEX):
            indexed = set(self.json(INDEX)["weight_map"].values())
            if indexed != set(names):
                raise CheckpointError(
                    f"{self.path / INDEX} points to {sorted(indexed)}, the checkpoint's weights are in {names}"
                )
        if not names:
            raise CheckpointError(f"{self.path} holds no weights in safetensors files")
        return [self.path / name for name in names]


def open_checkpoint(path: str | os.PathLike[str], *, verified: Manifest | None = None) -> Checkpoint:
    """Verify a checkpoint and open it for reading.

    verified: the manifest that `verify_checkpoint` or `find_latest` returned for this path; saves reading it all again.

    Raises:
        CheckpointError: see `verify_checkpoint`.
    """
    path = Path(path)
    return Checkpoint(path, verified or verify_checkpoint(path))
