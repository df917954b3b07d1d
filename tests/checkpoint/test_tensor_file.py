"""The files are what the safetensors library reads, byte by byte aligned, and their sums are right."""

import hashlib
import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from neox_hf.checkpoint.tensor_file import DTYPES, write_tensors

TENSORS = {
    "matrix": torch.arange(12.0).reshape(3, 4),
    "transposed": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).t(),
    "scalar": torch.tensor(7),
    "empty": torch.empty(0, 5),
    "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "flags": torch.tensor([True, False, True]),
    "half": torch.tensor([1.5], dtype=torch.float16),
}


def test_the_library_reads_what_is_written(tmp_path):
    path = tmp_path / "x.safetensors"
    digest = write_tensors(path, TENSORS, {"format": "pt"})
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back(tmp_path, dtype):
    path, tensor = tmp_path / "x.safetensors", torch.tensor([[0, 1], [1, 0]]).to(dtype)
    write_tensors(path, {"x": tensor})
    assert torch.equal(load_file(path)["x"].view(torch.uint8), tensor.view(torch.uint8))


def test_elements_are_aligned(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    for name, entry in json.loads(data[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % TENSORS[name].element_size() == 0


def test_more_than_one_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("neox_hf.checkpoint.tensor_file.CHUNK_BYTES", 7)
    path = tmp_path / "x.safetensors"
    assert write_tensors(path, TENSORS) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert torch.equal(load_file(path)["matrix"], TENSORS["matrix"])
