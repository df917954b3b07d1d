"""The final model, in the output directory itself, where HF users look for it."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from neox_hf.checkpoint.adapters import ADAPTER, ADAPTER_CONFIG, adapters_of, has_adapters, save_adapter_files
from neox_hf.checkpoint.directory import final_path
from neox_hf.checkpoint.durable import allow_usual_readers, sync_directory, sync_file, writing
from neox_hf.checkpoint.model_files import save_model_files
from neox_hf.checkpoint.tensor_file import write_tensors
from neox_hf.checkpoint.verify import is_safe
from neox_hf.checkpoint.weight_names import weights_of
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

    Of a model with PEFT's adapters these are saved, and not the base model, as PEFT does it.

    Files are written aside, made durable and moved one by one; what makes new weights visible (`model.safetensors`, or
    the index of the shards, or `adapter_config.json`) comes last. Killed at any point, the directory loads as the old
    model, as the new one, or, where shards of the same names are being replaced or adapters come or go, not at all:
    never as a mixture of weights.

    topology: how the model is split, and every rank calls; by default this rank alone has all of it.

    Raises:
        CheckpointError: something cannot be written.
    """
    output_dir, topology = Path(output_dir), topology or Topology.single()
    work = final_path(output_dir)
    from_first_rank(topology, lambda: _begin(work))
    adapted, index = has_adapters(model, topology), None
    with writing(output_dir):
        if adapted:
            adapters = adapters_of(model, topology)
            mine = (file for adapter in adapters for file in adapter.files(topology))
        else:
            files = WeightFiles(weights_of(model), topology, limit=shard_bytes)
            mine, index = files.mine(), files.index
        for name, tensors in mine:
            (work / name).parent.mkdir(exist_ok=True)
            write_tensors(work / name, tensors, METADATA)
            _make_durable(work / name)
    together(topology, lambda: None)

    def finish() -> None:
        with writing(output_dir):
            weights = set(work.rglob("*"))
            if adapted:
                save_adapter_files(adapters, work, tokenizer)
            else:
                save_model_files(model, work, tokenizer)
            _write_beside(work, {**(extra_files or {}), **({INDEX: index} if index else {})})
            everything = sorted((path for path in work.rglob("*") if path.is_file()), key=_moves_last)
            for path in everything:
                if path not in weights:
                    _make_durable(path)
            move_into_place(everything, work, output_dir)
            shutil.rmtree(work)

    from_first_rank(topology, finish)
    return output_dir


def _begin(work: Path) -> None:
    with writing(work.parent):
        if work.exists():
            shutil.rmtree(work)
        work.mkdir(parents=True)


def _write_beside(work: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        assert is_safe(name), f"{name!r} is not a plain path inside the output directory"
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(content)


def _make_durable(path: Path) -> None:
    allow_usual_readers(path)
    sync_file(path)


def move_into_place(files: list[Path], work: Path, output_dir: Path) -> None:
    """Replace the files of `output_dir` one by one, and remove what is left over of an earlier model."""
    new = {path.relative_to(work).as_posix() for path in files}
    left_over = _left_over(new, work, output_dir)
    first = _describes_another(new, left_over, work, output_dir)
    _remove(first, output_dir)
    for path in files:
        target = output_dir / path.relative_to(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    for folder in {output_dir, *((output_dir / name).parent for name in new)}:
        sync_directory(folder)
    _remove(left_over - first, output_dir)


def _left_over(new: set[str], work: Path, output_dir: Path) -> set[str]:
    """Names at the top of `output_dir` that belong to a model which the `new` files replace."""
    old = {path.name for path in output_dir.iterdir()}
    adapters = old & {ADAPTER, ADAPTER_CONFIG}
    configs = [work / name for name in new if Path(name).name == ADAPTER_CONFIG]
    model = {name for name in old if _is_weights(name)}
    if configs:
        # Beside adapters transformers takes a `config.json` for that of their base model.
        replaced = _base_lies_elsewhere(configs, output_dir)
        model = model | (old & {CONFIG_NAME, GENERATION_CONFIG_NAME}) if replaced else set()
    return (adapters | model) - new


def _base_lies_elsewhere(configs: list[Path], output_dir: Path) -> bool:
    """False where `output_dir` is the base model of one of the adapters, or may be: one says nothing of its base."""
    bases = [json.loads(config.read_bytes())["base_model_name_or_path"] for config in configs]
    return all(base and Path(base).resolve() != output_dir.resolve() for base in bases)


def _describes_another(new: set[str], left_over: set[str], work: Path, output_dir: Path) -> set[str]:
    """What must be gone before the first file moves, or it would describe weights of two models."""
    old = {path.name for path in output_dir.iterdir()}
    shards = {name for name in new & old if _is_weights(name)} - {INDEX}
    stale = left_over & {ADAPTER_CONFIG, CONFIG_NAME}
    for name in new:
        target = output_dir / name
        if target.name == ADAPTER_CONFIG and target.exists():
            stale |= set() if target.read_bytes() == (work / name).read_bytes() else {name}
    return stale | ({INDEX} if INDEX in old and shards else set())


def _remove(names: set[str], output_dir: Path) -> None:
    for name in sorted(names):
        (output_dir / name).unlink(missing_ok=True)
    if names:
        sync_directory(output_dir)


def _is_weights(name: str) -> bool:
    return name == INDEX or (name.startswith("model") and name.endswith(".safetensors"))


def _moves_last(path: Path) -> tuple[bool, str]:
    return path.name in (SINGLE, INDEX, ADAPTER_CONFIG), path.as_posix()
