"""Safetensors files, written tensor by tensor.

The library's own writer wants all tensors of a file in host memory at once, and keeps the interpreter to itself until
the file is there, which would stop the training step that runs beside it.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8
CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Unmade:
    """A tensor that comes into being as it is written. like: its shape and dtype, on `meta`. make: it, anywhere."""

    like: Tensor
    make: Callable[[], Tensor]


def write_tensors(path: Path, tensors: Mapping[str, Tensor | Unmade], metadata: Mapping[str, str] | None = None) -> str:
    """Write one file and return its sha256. A tensor on a device passes through host memory alone, and so does one that
    is made.

    Format: https://huggingface.co/docs/safetensors; wide elements come first, so that all are aligned.

    Raises:
        OSError: the disk is full, or the like.
    """
    like = {key: tensor.like if isinstance(tensor, Unmade) else tensor for key, tensor in tensors.items()}
    order = sorted(like, key=lambda key: (-like[key].element_size(), key))
    digest = hashlib.sha256()
    with path.open("wb") as file:
        _write(file, digest, memoryview(_header(order, like, metadata)))
        for key in order:
            _write(file, digest, _bytes_of(tensors[key]))
    return digest.hexdigest()


def _header(order: list[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key in order:
        tensor = tensors[key]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def made(tensor: Tensor | Unmade) -> Tensor:
    """The tensor itself, which may be the run's own."""
    return tensor.make().detach() if isinstance(tensor, Unmade) else tensor.detach()


def _bytes_of(tensor: Tensor | Unmade) -> memoryview:
    flat = made(tensor).cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def _write(file: BufferedWriter, digest: "hashlib._Hash", data: memoryview) -> None:
    for start in range(0, len(data), CHUNK_BYTES):
        chunk = data[start : start + CHUNK_BYTES]
        file.write(chunk)
        digest.update(chunk)
