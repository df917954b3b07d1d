"""The final model, in the output directory itself, where HF users look for it."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from neox_hf.checkpoint.directory import final_path
from neox_hf.checkpoint.durable import allow_usual_readers, sync_directory, sync_file, writing
from neox_hf.checkpoint.model_files import save_model_files
from neox_hf.checkpoint.tensor_file import write_tensors
from neox_hf.checkpoint.verify import is_safe
from neox_hf.checkpoint.weights import INDEX, METADATA, SHARD_BYTES, SINGLE, WeightFiles
from neox_hf.parallel.collectives import from_first_rank, together
from neox_hf.parallel.topology import Topology


def write_final(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    output_dir: str | os.PathLike[str],
    extra_files: Mapping[str, bytes] | None = None,
    *,
    topology: Topology | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Put model, tokenizer and `extra_files` (relative name -> content) into `output_dir`, and return its path.

    Files are written aside, made durable and moved one by one; what makes new weights visible (`model.safetensors`, or
    the index of the shards) comes last. Killed at any point, the directory loads as the old model, as the new one, or,
    where shards of the same names are being replaced, not at all: never as a mixture of weights.

    topology: how the model is split, and every rank calls; by default this rank alone has all of it.

    Raises:
        CheckpointError: something cannot be written.
    """
    output_dir, topology = Path(output_dir), topology or Topology.single()
    work = final_path(output_dir)
    from_first_rank(topology, lambda: _begin(work))
    with writing(output_dir):
        files = WeightFiles(model, topology, limit=shard_bytes)
        for name, tensors in files.mine():
            write_tensors(work / name, tensors, METADATA)
            _make_durable(work / name)
    together(topology, lambda: None)

    def finish() -> None:
        with writing(output_dir):
            beside = {**(extra_files or {}), **({INDEX: files.index} if files.index else {})}
            _write_beside(model, tokenizer, work, beside)
            everything = sorted((path for path in work.rglob("*") if path.is_file()), key=_moves_last)
            move_into_place(everything, work, output_dir)
            shutil.rmtree(work)

    from_first_rank(topology, finish)
    return output_dir


def _begin(work: Path) -> None:
    with writing(work.parent):
        if work.exists():
            shutil.rmtree(work)
        work.mkdir(parents=True)


def _write_beside(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, work: Path, files: Mapping[str, bytes]
) -> None:
    weights = set(work.iterdir())
    save_model_files(model, work, tokenizer)
    for name, content in files.items():
        assert is_safe(name), f"{name!r} is not a plain path inside the output directory"
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(content)
    for path in work.rglob("*"):
        if path.is_file() and path not in weights:
            _make_durable(path)


def _make_durable(path: Path) -> None:
    allow_usual_readers(path)
    sync_file(path)


def move_into_place(files: list[Path], work: Path, output_dir: Path) -> None:
    """Replace the files of `output_dir` one by one, and remove weights of an earlier model that are left over."""
    new_weights = {path.name for path in files if path.parent == work and _is_weights(path)}
    old_weights = {path.name for path in output_dir.iterdir() if _is_weights(path)}
    if INDEX in old_weights and (new_weights & old_weights) - {INDEX}:
        (output_dir / INDEX).unlink()  # it must not describe shards of two models
        sync_directory(output_dir)
    for path in files:
        target = output_dir / path.relative_to(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    sync_directory(output_dir)
    for name in sorted(old_weights - new_weights):
        (output_dir / name).unlink(missing_ok=True)
    sync_directory(output_dir)


def _is_weights(path: Path) -> bool:
    return path.name == INDEX or (path.name.startswith("model") and path.suffix == ".safetensors")


def _moves_last(path: Path) -> tuple[bool, str]:
    return path.name in (SINGLE, INDEX), path.as_posix()
