"""Weights out of safetensors files into the parameters that this rank holds; only what it needs is read."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from neox_hf.checkpoint.box_files import open_file, probe
from neox_hf.checkpoint.fragments import Fragment
from neox_hf.checkpoint.partitioned import forget_gathered, is_partitioned, partition_of, partition_range
from neox_hf.checkpoint.weight_names import Weight, weights_of
from neox_hf.errors import CheckpointError
from neox_hf.parallel.collectives import together
from neox_hf.parallel.topology import Topology

LEGACY_BUFFERS = (r"\.attention\.(masked_)?bias$", r"\.rotary_emb\.inv_freq$")
"""What older transformers saved beside the weights: masks and wavelengths, which follow from the configuration."""


def load_weights(
    model: PreTrainedModel, files: list[Path], *, cast: bool = False, topology: Topology | None = None
) -> None:
    """Fill every parameter and persistent buffer that this rank holds, or change nothing. Every rank calls it.

    cast: accept floating-point weights of another dtype. topology: by default this rank alone decides.

    Raises:
        CheckpointError: on every rank, when a name is missing, unknown or found twice, or a shape or dtype differs.
    """
    topology = topology or Topology.single()
    places = together(topology, lambda: _check(model, files, cast))
    together(topology, lambda: _fill(places, topology.data_rank))


@dataclass(frozen=True)
class _SavedWeight:
    handle: safe_open
    key: str
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, region: tuple[slice, ...]) -> Tensor:
        return self.handle.get_slice(self.key)[region] if region else self.handle.get_tensor(self.key)


def _check(model: PreTrainedModel, files: list[Path], cast: bool) -> list[tuple[Weight, _SavedWeight]]:
    places = _match(model, _saved_weights(files))
    for weight, source in places:
        _check_alike(weight, source, cast)
    return places


@torch.no_grad()
def _fill(places: list[tuple[Weight, _SavedWeight]], data_rank: int) -> None:
    for weight, source in places:
        if not weight.is_local:
            continue
        if is_partitioned(weight.tensor):
            _fill_partition(weight, source, data_rank)
        elif weight.shard is not None:
            _fill_shard(weight, source)
        else:
            weight.tensor.copy_(source.read(()))


def _fill_shard(weight: Weight, source: _SavedWeight) -> None:
    shard = weight.shard
    weight.tensor.zero_()  # the padding, if there is any
    if shard.length:
        real = shard.real(weight.tensor)
        real.copy_(source.read(_region(shard.offsets, tuple(real.shape))))


def _fill_partition(weight: Weight, source: _SavedWeight, data_rank: int) -> None:
    fragment = Fragment(weight.name, weight.shape, start=partition_range(weight.tensor, data_rank)[0])
    for box in fragment.boxes(partition_of(weight.tensor, data_rank)):
        box.tensor.copy_(source.read(_region(box.offsets, box.extent)))
    forget_gathered(weight.tensor)


def _region(offsets: tuple[int, ...], extent: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(offsets, extent, strict=True))


def _saved_weights(files: list[Path]) -> dict[str, _SavedWeight]:
    saved: dict[str, _SavedWeight] = {}
    for file in files:
        handle = open_file(file)
        for key in handle.keys():  # noqa: SIM118 - the handle is no mapping
            if key in saved:
                raise CheckpointError(f"{key} is in two files, {saved[key].file} and {file.name}")
            saved[key] = _SavedWeight(handle, key, file.name, *probe(handle, key))
    return saved


def _match(model: PreTrainedModel, saved: dict[str, _SavedWeight]) -> list[tuple[Weight, _SavedWeight]]:
    """Pair every tensor of the model, local or not, with the one saved tensor that is meant for it."""
    places, used = [], set()
    for weight in weights_of(model):
        found = [name for name in weight.spellings if name in saved]
        if not found:
            raise CheckpointError(f"the checkpoint's weights lack {weight.name}, which the model has")
        if len(found) > 1:
            raise CheckpointError(
                f"the model has one tensor for {' and '.join(found)}, the checkpoint has {len(found)}"
            )
        places.append((weight, saved[found[0]]))
        used.add(found[0])
    ignored = (*LEGACY_BUFFERS, *(model._keys_to_ignore_on_load_unexpected or ()))
    unknown = sorted(name for name in saved.keys() - used if not any(re.search(pattern, name) for pattern in ignored))
    if unknown:
        raise CheckpointError(f"the checkpoint's weights hold {', '.join(unknown[:5])}, which the model lacks")
    return places


def _check_alike(weight: Weight, source: _SavedWeight, cast: bool) -> None:
    if source.shape != weight.shape:
        raise CheckpointError(
            f"{source.key} has shape {source.shape} in {source.file} and {weight.shape} in the model; "
            "use the model section of the recipe that wrote it"
        )
    floating = source.dtype.is_floating_point and weight.dtype.is_floating_point
    if source.dtype != weight.dtype and not (cast and floating):
        raise CheckpointError(
            f"{source.key} is {source.dtype} in {source.file} and {weight.dtype} in the model; "
            "use the train.precision that wrote it"
        )
