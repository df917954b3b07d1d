"""Writing a checkpoint so that it is there whole, or not there.

Everything goes into `tmp-checkpoint-N/`. The commit makes it durable, lists it in the manifest and renames it. Each
phase is a method of its own, so that a test can kill the process in any of them.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from neox_hf.checkpoint.adapters import Adapter, adapters_of, has_adapters, save_adapter_files
from neox_hf.checkpoint.box_files import pack_boxes
from neox_hf.checkpoint.boxes import Box
from neox_hf.checkpoint.directory import (
    MANIFEST,
    STATE,
    aside_path,
    finished_path,
    rank_file,
    recover,
    remove_checkpoint,
    unfinished_path,
)
from neox_hf.checkpoint.durable import (
    allow_usual_readers,
    sha256_of_all,
    sync_directory,
    sync_file,
    write_durably,
    writing,
)
from neox_hf.checkpoint.host_memory import HostMemory
from neox_hf.checkpoint.manifest import FileRecord, Manifest
from neox_hf.checkpoint.model_files import save_model_files
from neox_hf.checkpoint.tensor_file import Unmade, made, write_tensors
from neox_hf.checkpoint.verify import is_safe
from neox_hf.checkpoint.weight_names import weights_of
from neox_hf.checkpoint.weights import INDEX, METADATA, SHARD_BYTES, WeightFiles
from neox_hf.errors import CheckpointError
from neox_hf.parallel.topology import Topology
from neox_hf.version import versions


class CheckpointWriter:
    """Writes checkpoint `step` of `output_dir`, together with the other ranks of the world.

    Rank 0 must hold the directory's `OutputLock`. `barrier` returns when every rank has called it. All ranks construct
    the writer and commit; in between each writes what it has. `path` is where the files lie until the commit.

    memory: where tensors are copied to at once, to be written by `write_deferred`, in whatever thread calls it. None:
        they are written at once.

    Raises:
        CheckpointError: here and in every method, when something cannot be written; earlier checkpoints remain.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        step: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], None] = lambda: None,
        memory: HostMemory | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.step, self.rank, self.world_size = step, rank, world_size
        self.path = unfinished_path(self.output_dir, step)
        self.memory = memory
        self._barrier = barrier
        self._sums: dict[str, str | None] = {}
        self._waiting: list[tuple[str, dict[str, Tensor], Mapping[str, str]]] = []
        if rank == 0:
            with writing(self.path):
                self.output_dir.mkdir(parents=True, exist_ok=True)
                recover(self.output_dir)
                (self.path / STATE).mkdir(parents=True)
        barrier()
        if not self.path.is_dir():
            raise CheckpointError(
                f"rank {rank} does not see {self.path}, which rank 0 has made; output_dir must be shared by all ranks"
            )

    def write_weights(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        topology: Topology | None = None,
        dtype: torch.dtype | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Write what `from_pretrained` needs. Every rank calls it.

        Of a model with PEFT's adapters that is the adapters; all of its weights, as it names them, go to `state/`.

        topology: how the model is split; by default every rank holds all of it.
        dtype: cast floating-point weights on the way to disk. shard_bytes: most that one weights file holds.
        """
        topology = topology or Topology(data=self.world_size, rank=self.rank)
        files = WeightFiles(weights_of(model), topology, dtype, shard_bytes, self.memory)
        adapted = has_adapters(model, topology)
        with writing(self.path):
            for name, tensors in files.mine():
                self._put(f"{STATE}/{name}" if adapted else name, tensors, METADATA, copied=True)
            if adapted:
                self._write_adapters(adapters_of(model, topology), tokenizer, topology, dtype)
            elif self.rank == 0:
                if files.index is not None:
                    self.write_bytes(INDEX, files.index)
                work = self.path / "model"
                save_model_files(model, work, tokenizer, dtype)
                self._adopt(work)

    def write_boxes(self, stem: str, boxes: Iterable[Box]) -> None:
        """Write this rank's boxes into `state/<stem>-<rank>-of-<world>.safetensors`."""
        self._put(self._rank_file(stem), *pack_boxes(boxes))

    def write_tensors(self, stem: str, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write tensors that belong to this rank alone into `state/<stem>-<rank>-of-<world>.safetensors`."""
        self._put(self._rank_file(stem), tensors, metadata)

    def write_json(self, relative_path: str, obj: Any) -> None:
        """Write a JSON file, such as `trainer_state.json` or `state/data.json`."""
        self.write_bytes(relative_path, (json.dumps(obj, indent=2) + "\n").encode())

    def write_bytes(self, relative_path: str, data: bytes) -> None:
        """Write any other file. Two ranks must not write the same path."""
        with self._new_file(relative_path) as path:
            path.write_bytes(data)

    def commit(self, metadata: Mapping[str, Any] | None = None) -> Path:
        """Turn what all ranks have written into `checkpoint-N`, and return its path.

        metadata: the run's own facts for the manifest, such as samples and tokens consumed; rank 0's are kept.
        """
        self.write_deferred()
        self.seal()
        self._barrier()
        if self.rank == 0:
            self.finish(metadata)
        self._barrier()
        return finished_path(self.output_dir, self.step)

    def finish(self, metadata: Mapping[str, Any] | None = None) -> Path:
        """Rank 0's part of a commit, once all ranks have sealed theirs; returns the checkpoint's path."""
        final = finished_path(self.output_dir, self.step)
        with writing(final):
            self.write_manifest(dict(metadata or {}))
            self.make_names_durable()
            self.set_aside(final)
            self.rename(final)
            self.remove_set_aside()
        return final

    # The phases of a commit, in their order.

    def write_deferred(self) -> None:
        """Write the tensors that wait in host memory."""
        while self._waiting:
            self._write_file(*self._waiting.pop(0))

    def seal(self) -> None:
        """Bring this rank's files to the disk and leave a record of their sizes and sums for rank 0."""
        with writing(self.path):
            for name in self._sums:
                allow_usual_readers(self.path / name)
                sync_file(self.path / name)
            unknown = [name for name, digest in self._sums.items() if digest is None]
            sums = {**self._sums, **dict(zip(unknown, sha256_of_all([self.path / n for n in unknown]), strict=True))}
            records = [asdict(FileRecord(name, (self.path / name).stat().st_size, sums[name])) for name in sorted(sums)]
            done = self._done_record(self.rank)
            # Renamed when whole: rank 0 may be looking for it.
            part = done.with_suffix(".part")
            write_durably(part, json.dumps(records).encode())
            os.rename(part, done)

    def unsealed_ranks(self) -> list[int]:
        """The ranks that have left no done record yet."""
        return [rank for rank in range(self.world_size) if not self._done_record(rank).exists()]

    def write_manifest(self, metadata: dict[str, Any]) -> None:
        """Merge the ranks' records into the manifest."""
        files: dict[str, FileRecord] = {}
        for rank in range(self.world_size):
            done = self._done_record(rank)
            for record in json.loads(done.read_bytes()):
                if record["path"] in files:
                    raise CheckpointError(f"{record['path']} was written by rank {rank} and by another rank")
                files[record["path"]] = FileRecord(**record)
            done.unlink()
        manifest = Manifest(
            step=self.step,
            world_size=self.world_size,
            metadata=metadata,
            versions=versions(),
            files=tuple(files[path] for path in sorted(files)),
        )
        write_durably(self.path / MANIFEST, manifest.to_bytes())

    def make_names_durable(self) -> None:
        """Bring the names of the files to the disk, deepest directory first."""
        for folder, _, _ in os.walk(self.path, topdown=False):
            sync_directory(Path(folder))

    def set_aside(self, final: Path) -> None:
        """Move an earlier checkpoint of this step out of the way; it stays valid and is found there."""
        if final.exists():
            os.rename(final, aside_path(self.output_dir, self.step))

    def rename(self, final: Path) -> None:
        """The moment the checkpoint comes into being."""
        os.rename(self.path, final)
        sync_directory(self.output_dir)

    def remove_set_aside(self) -> None:
        """Delete the checkpoint that this one replaces."""
        aside = aside_path(self.output_dir, self.step)
        if aside.exists():
            remove_checkpoint(aside)

    def _write_adapters(
        self,
        adapters: list[Adapter],
        tokenizer: PreTrainedTokenizerBase | None,
        topology: Topology,
        dtype: torch.dtype | None,
    ) -> None:
        for adapter in adapters:
            for name, tensors in adapter.files(topology, dtype, self.memory):
                self._put(name, tensors, METADATA, copied=True)
        if self.rank == 0:
            work = self.path / "model"
            save_adapter_files(adapters, work, tokenizer)
            self._adopt(work)

    def _put(
        self, relative_path: str, tensors: dict[str, Tensor | Unmade], metadata: Mapping[str, str], copied: bool = False
    ) -> None:
        if self.memory is None:
            self._write_file(relative_path, tensors, metadata)
        elif copied:
            self._waiting.append((relative_path, tensors, metadata))
        else:
            copies = {key: self.memory.copy(made(tensor)) for key, tensor in tensors.items()}
            self._waiting.append((relative_path, copies, metadata))

    def _write_file(self, relative_path: str, tensors: dict[str, Tensor | Unmade], metadata: Mapping[str, str]) -> None:
        with self._new_file(relative_path) as path:
            digest = write_tensors(path, tensors, metadata)
        self._sums[relative_path] = digest

    def _adopt(self, folder: Path) -> None:
        """Move the files of a folder of the checkpoint up to its top level; the commit will know them."""
        for file in [path for path in folder.rglob("*") if path.is_file()]:
            relative = file.relative_to(folder)
            (self.path / relative).parent.mkdir(parents=True, exist_ok=True)
            os.rename(file, self.path / relative)
            self._sums[relative.as_posix()] = None
        shutil.rmtree(folder)

    def _rank_file(self, stem: str) -> str:
        return rank_file(stem, self.rank, self.world_size)

    def _done_record(self, rank: int) -> Path:
        return self.path / STATE / f"done-{rank}-of-{self.world_size}.json"

    @contextmanager
    def _new_file(self, relative_path: str) -> Iterator[Path]:
        """The full path for a file that the body writes; the commit will know it."""
        assert is_safe(relative_path), f"{relative_path!r} is not a plain path inside the checkpoint"
        path = self.path / relative_path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path
        self._sums[relative_path] = None
