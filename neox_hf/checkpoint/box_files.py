"""Boxes in safetensors files: the elements as tensors, the geometry in the header's metadata."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from neox_hf.checkpoint.boxes import Box, SavedBox
from neox_hf.checkpoint.tensor_file import Unmade
from neox_hf.errors import CheckpointError

GEOMETRY = "boxes"


def pack_boxes(boxes: Iterable[Box]) -> tuple[dict[str, Tensor | Unmade], dict[str, str]]:
    """The tensors and the metadata of the file that holds these boxes."""
    tensors: dict[str, Tensor | Unmade] = {}
    geometry: dict[str, dict] = {}
    for box in boxes:
        key = box_key(box)
        assert key not in tensors, f"{key} is given twice"
        tensors[key] = box.tensor.detach() if box.make is None else Unmade(box.tensor, box.make)
        geometry[key] = {"name": box.name, "offsets": box.offsets, "shape": box.shape}
    return tensors, {GEOMETRY: json.dumps(geometry)}


def box_key(box: Box) -> str:
    """The tensor's own name when the box is all of it, else the name and the range in each dimension."""
    if box.extent == box.shape:
        return box.name
    ranges = ",".join(f"{start}:{start + n}" for start, n in zip(box.offsets, box.extent, strict=True))
    return f"{box.name}[{ranges}]"


def probe(handle: safe_open, key: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a tensor in an open file, without reading its elements."""
    part = handle.get_slice(key)
    shape = tuple(part.get_shape())
    # safetensors names its dtypes in its own way; an empty slice translates the name.
    sample = part[0:0] if shape else handle.get_tensor(key)
    return shape, sample.dtype


def open_file(path: Path) -> safe_open:
    """Open a safetensors file for reading.

    Raises:
        CheckpointError: it is not a complete safetensors file.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


class BoxFiles:
    """The boxes of several files, one per rank that wrote; a `BoxReader`."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files: dict[str, safe_open] = {}
        self._boxes: dict[str, list[SavedBox]] = defaultdict(list)
        for path in paths:
            handle = open_file(path)
            self._files[path.name] = handle
            for key, place in _geometry(path, handle).items():
                box = _saved_box(path, handle, key, place)
                self._boxes[box.name].append(box)

    def names(self) -> set[str]:
        """Names of the tensors of which there is at least one box."""
        return set(self._boxes)

    def find(self, name: str) -> list[SavedBox]:
        """The saved boxes of one tensor; none if the name is unknown."""
        return self._boxes.get(name, [])

    def read(self, box: SavedBox, region: tuple[slice, ...]) -> Tensor:
        """The elements of `region`, counted from the box's own corner; only they are read."""
        handle = self._files[box.file]
        return handle.get_slice(box.key)[region] if region else handle.get_tensor(box.key)


def _geometry(path: Path, handle: safe_open) -> dict[str, dict]:
    try:
        geometry = json.loads(handle.metadata()[GEOMETRY])
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} says nothing about its boxes ({error!r}); it is not a file of ours") from error
    if not isinstance(geometry, dict) or set(geometry) != set(handle.keys()):
        raise CheckpointError(f"{path}: its header describes other boxes than the file holds")
    return geometry


def _saved_box(path: Path, handle: safe_open, key: str, place: dict) -> SavedBox:
    extent, dtype = probe(handle, key)
    offsets, shape = tuple(place["offsets"]), tuple(place["shape"])
    fits = len(offsets) == len(extent) == len(shape) and all(
        start >= 0 and start + n <= whole for start, n, whole in zip(offsets, extent, shape, strict=True)
    )
    if not fits:
        raise CheckpointError(
            f"{path}: {key} of extent {extent} at {offsets} does not lie in a tensor of shape {shape}"
        )
    return SavedBox(place["name"], offsets, extent, shape, dtype, path.name, key)
