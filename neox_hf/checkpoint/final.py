"""The final model, in the output directory itself, where HF users look for it."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from neox_hf.checkpoint.directory import final_path
from neox_hf.checkpoint.durable import allow_usual_readers, sync_directory, sync_file, writing
from neox_hf.checkpoint.verify import is_safe
from neox_hf.checkpoint.weights import INDEX, SHARD_SIZE, save_weights

SINGLE = "model.safetensors"


def write_final(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    output_dir: str | os.PathLike[str],
    extra_files: Mapping[str, bytes] | None = None,
    shard_size: str = SHARD_SIZE,
) -> Path:
    """Put model, tokenizer and `extra_files` (relative name -> content) into `output_dir`, and return its path.

    Files are written aside, made durable and moved one by one; what makes new weights visible (`model.safetensors`, or
    the index of the shards) comes last. Killed at any point, the directory loads as the old model, as the new one, or,
    where shards of the same names are being replaced, not at all: never as a mixture of weights.

    Raises:
        CheckpointError: something cannot be written.
    """
    output_dir = Path(output_dir)
    work = final_path(output_dir)
    with writing(output_dir):
        if work.exists():
            shutil.rmtree(work)
        work.mkdir(parents=True)
        save_weights(model, work, tokenizer, shard_size=shard_size)
        for name, content in (extra_files or {}).items():
            assert is_safe(name), f"{name!r} is not a plain path inside the output directory"
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_bytes(content)
        files = sorted((path for path in work.rglob("*") if path.is_file()), key=_moves_last)
        for path in files:
            allow_usual_readers(path)
            sync_file(path)
        move_into_place(files, work, output_dir)
        shutil.rmtree(work)
    return output_dir


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
