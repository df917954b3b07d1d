"""Released weights: a folder or a repository on the Hub, read straight into the shards of a model."""

import json
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from neox_hf.checkpoint.verify import is_safe
from neox_hf.checkpoint.weight_loading import load_weights
from neox_hf.checkpoint.weights import INDEX, SINGLE
from neox_hf.errors import RecipeError
from neox_hf.parallel.collectives import first_rank_first
from neox_hf.parallel.topology import Topology

PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def load_released_weights(
    model: PreTrainedModel, path_or_id: str, revision: str = "main", topology: Topology | None = None
) -> None:
    """Fill what this rank holds of `model` from released safetensors, of whatever floating-point dtype. Every rank
    calls it; rank 0 downloads first, and no rank holds the whole model.

    Raises:
        RecipeError: there are none under that name and revision, or only pickled ones.
        CheckpointError: they are not this model's: a name is missing or unknown, or a shape differs.
    """
    topology = topology or Topology.single()
    files = first_rank_first(topology, lambda: released_files(path_or_id, revision))
    load_weights(model, files, cast=True, topology=topology)


def released_files(path_or_id: str, revision: str = "main") -> list[Path]:
    """The local paths of the safetensors files, downloaded into the Hub's cache if need be.

    Raises:
        RecipeError: see `load_released_weights`.
    """
    index = _find(path_or_id, revision, INDEX)
    if index is not None:
        return [_fetch(path_or_id, revision, name) for name in _files_in(index)]
    single = _find(path_or_id, revision, SINGLE)
    if single is not None:
        return [single]
    pickled = [name for name in PICKLED if _find(path_or_id, revision, name) is not None]
    if pickled:
        raise RecipeError(
            f"model.pretrained={path_or_id!r} at {revision!r} has its weights in {pickled[0]} alone, a pickle, which "
            "runs code when it is loaded; name a revision with safetensors files, or convert it first"
        )
    raise RecipeError(f"model.pretrained={path_or_id!r} at {revision!r} has neither {SINGLE} nor {INDEX}")


def _files_in(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{index} is no index of safetensors files: {error!r}") from error
    strange = [name for name in names if not is_safe(str(name)) or not str(name).endswith(".safetensors")]
    if strange:
        raise RecipeError(f"{index} points to {strange[0]!r}, which is no safetensors file beside it")
    return names


def _fetch(path_or_id: str, revision: str, name: str) -> Path:
    path = _find(path_or_id, revision, name)
    if path is None:
        raise RecipeError(f"model.pretrained={path_or_id!r} at {revision!r}: its index names {name}, which is missing")
    return path


def _find(path_or_id: str, revision: str, name: str) -> Path | None:
    """The local path of a file; None if the folder or the repository lacks it."""
    try:
        found = cached_file(path_or_id, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise RecipeError(f"model.pretrained={path_or_id!r} at {revision!r} cannot be loaded: {error}") from error
    return None if found is None else Path(found)
