"""Host memory of checkpoints: copies are the tensors, none overlaps another, and what is cleared is used again."""

from pathlib import Path

import pytest
import torch

from neox_hf.checkpoint import host_memory
from neox_hf.checkpoint.host_memory import HostMemory
from neox_hf.checkpoint.tensor_file import DTYPES


def some_tensors() -> list[torch.Tensor]:
    numbers = torch.arange(24.0).reshape(4, 6)
    views = [numbers, numbers.t(), numbers[:, 1:3], numbers[0, 0], numbers[:0], torch.ones(1000)]
    return [*views, *(numbers.to(dtype) for dtype in DTYPES)]


@pytest.fixture
def memory(monkeypatch) -> HostMemory:
    monkeypatch.setattr(host_memory, "BLOCK_BYTES", 1024)
    return HostMemory()


def test_copies_are_the_tensors_and_apart(memory):
    tensors = some_tensors()
    copies = [memory.copy(tensor) for tensor in tensors]
    for tensor, copy in zip(tensors, copies, strict=True):
        assert copy.is_contiguous()
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy.double(), tensor.double())
    for at, copy in enumerate(copies):
        copy.copy_(torch.full(copy.shape, at % 2))
    assert all(bool((copy.double() == at % 2).all()) for at, copy in enumerate(copies))


def test_what_is_cleared_is_used_again(memory):
    places = []
    for _ in range(3):
        places.append([memory.copy(tensor).data_ptr() for tensor in some_tensors()])
        kept = memory.size
        memory.clear()
    assert places[0] == places[1] == places[2]
    assert memory.size == kept
    memory.copy(torch.zeros(2000))
    assert memory.size == kept + 8000  # which is more than any block has


def test_a_tensor_larger_than_a_block_has_one_of_its_own(memory):
    memory.copy(torch.zeros(10))
    memory.copy(torch.zeros(1024))
    memory.copy(torch.zeros(10))
    assert memory.size == 1024 + 4096


def test_copies_are_in_host_memory_whatever_the_default_device(memory):
    given = torch.ones(3)
    with torch.device("meta"):
        copy = memory.copy(given)
    assert copy.tolist() == [1.0, 1.0, 1.0]


def test_a_child_does_not_share_it(memory):
    address, flags = memory.copy(torch.ones(3)).data_ptr(), []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(each, 16) for each in head.split("-"))
            inside = begin <= address < end
        elif head == "VmFlags:" and inside:
            flags = line.split()
    assert "dc" in flags  # don't copy on fork
