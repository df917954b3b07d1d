"""A model's weights under the names the ecosystem uses on disk, out of the model and back into it.

transformers calls the LM head `lm_head` in memory and `embed_out` on disk, and has changed its mind before. The head is
therefore found as the model's output embedding, and either spelling is read.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from neox_hf.checkpoint.box_files import open_file, probe
from neox_hf.errors import CheckpointError

HEAD_ON_DISK = "embed_out"
HEAD_SPELLINGS = (HEAD_ON_DISK, "lm_head")
INDEX = "model.safetensors.index.json"
SHARD_SIZE = "5GB"


def save_weights(
    model: PreTrainedModel,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    shard_size: str = SHARD_SIZE,
) -> None:
    """Write what `from_pretrained` needs: configuration, generation configuration, safetensors, tokenizer.

    dtype: cast floating-point weights on the way to disk; the model's own dtype when None.
    """
    state = model.state_dict() if dtype is None else _cast(model.state_dict(), dtype)
    model.save_pretrained(directory, state_dict=state, max_shard_size=shard_size)
    if dtype is not None:
        config = directory / "config.json"
        saved = {**json.loads(config.read_text()), "dtype": str(dtype).removeprefix("torch.")}
        config.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
    if tokenizer is not None:
        _save_tokenizer(tokenizer, directory)


def hf_names(model: PreTrainedModel) -> dict[nn.Parameter, str]:
    """Each parameter's name on disk; a tied parameter has one."""
    return {parameter: _spellings(model, name)[0] for name, parameter in model.named_parameters()}


def load_weights(model: PreTrainedModel, files: list[Path], *, cast: bool = False) -> None:
    """Fill every parameter and persistent buffer of `model` from safetensors files, or change nothing.

    cast: accept floating-point weights of another dtype.

    Raises:
        CheckpointError: a name is missing, unknown or found twice, or a shape or dtype differs.
    """
    saved = _saved_weights(files)
    places = _match(model, saved)
    for name, target, source in places:
        _check_alike(name, target, source, cast)
    with torch.no_grad():
        for _, target, source in places:
            target.copy_(source.handle.get_tensor(source.key))


@dataclass(frozen=True)
class _SavedWeight:
    handle: safe_open
    key: str
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def _saved_weights(files: list[Path]) -> dict[str, _SavedWeight]:
    saved: dict[str, _SavedWeight] = {}
    for file in files:
        handle = open_file(file)
        for key in handle.keys():  # noqa: SIM118 - the handle is no mapping
            if key in saved:
                raise CheckpointError(f"{key} is in two files, {saved[key].file} and {file.name}")
            saved[key] = _SavedWeight(handle, key, file.name, *probe(handle, key))
    return saved


def _match(model: PreTrainedModel, saved: dict[str, _SavedWeight]) -> list[tuple[str, Tensor, _SavedWeight]]:
    """Pair every tensor of the model with the one saved tensor that is meant for it."""
    names_of: dict[Tensor, list[str]] = {}  # tensors hash by identity: tied names meet in one entry
    for name, tensor in model.state_dict(keep_vars=True).items():
        names_of.setdefault(tensor, []).extend(_spellings(model, name))
    places = []
    for tensor, spellings in names_of.items():
        found = [name for name in dict.fromkeys(spellings) if name in saved]
        if not found:
            raise CheckpointError(f"the checkpoint's weights lack {spellings[0]}, which the model has")
        if len(found) > 1:
            raise CheckpointError(
                f"the model has one tensor for {' and '.join(found)}, the checkpoint has {len(found)}"
            )
        places.append((found[0], tensor, saved[found[0]]))
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    unknown = saved.keys() - {name for name, _, _ in places}
    unknown = sorted(name for name in unknown if not any(re.search(pattern, name) for pattern in ignored))
    if unknown:
        raise CheckpointError(f"the checkpoint's weights hold {', '.join(unknown[:5])}, which the model lacks")
    return places


def _check_alike(name: str, target: Tensor, source: _SavedWeight, cast: bool) -> None:
    if source.shape != tuple(target.shape):
        raise CheckpointError(
            f"{name} has shape {source.shape} in {source.file} and {tuple(target.shape)} in the model; "
            "use the model section of the recipe that wrote it"
        )
    floating = source.dtype.is_floating_point and target.dtype.is_floating_point
    if source.dtype != target.dtype and not (cast and floating):
        raise CheckpointError(
            f"{name} is {source.dtype} in {source.file} and {target.dtype} in the model; "
            "use the train.precision that wrote it"
        )


def _spellings(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    """Names on disk for a name in the model, the one we write first."""
    head = model.get_output_embeddings()
    if head is None or model.base_model_prefix != "gpt_neox":
        return (name,)
    prefix = next(path for path, module in model.named_modules() if module is head)
    if not name.startswith(f"{prefix}."):
        return (name,)
    return tuple(spelling + name.removeprefix(prefix) for spelling in HEAD_SPELLINGS)


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    # One copy per storage, so that transformers still sees which weights are tied.
    copies: dict[tuple, Tensor] = {}
    for tensor in state.values():
        place = (tensor.data_ptr(), tensor.shape)
        if place not in copies:
            copies[place] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return {name: copies[tensor.data_ptr(), tensor.shape] for name, tensor in state.items()}


def _save_tokenizer(tokenizer: "PreTrainedTokenizerBase", directory: Path) -> None:
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:
        if type(error) is not Exception:
            raise
        # The tokenizers library reports a failed write as a bare Exception.
        raise OSError(f"the tokenizer was not written: {error}") from error
