"""Until a GPU has shown the kernels right, nothing trains with them there; tests still run them."""

from types import SimpleNamespace

import pytest
import torch

from neox_hf.kernels import fp8_choice
from neox_hf.kernels.fp8_cast import FP8_CAST
from neox_hf.kernels.fp8_choice import how_it_is_rounded, reason_against_kernels
from neox_hf.kernels.fp8_gelu import FP8_GELU, FP8_GELU_BACKWARD

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=[False, True])
def right(request, monkeypatch) -> bool:
    """What a GPU has shown."""
    monkeypatch.setattr(fp8_choice, "KERNELS_ARE_RIGHT_ON_CUDA", request.param)
    return request.param


@pytest.mark.parametrize("op", [FP8_CAST, FP8_GELU, FP8_GELU_BACKWARD], ids=lambda op: op.name)
def test_what_each_choice_comes_to(op, right):
    on_cuda = SimpleNamespace(device=CUDA, dtype=torch.bfloat16)
    assert op.choose("auto", on_cuda) is (op.triton if right else op.torch)
    assert op.has_kernel_for("auto", on_cuda) is right
    assert op.choose("triton", on_cuda) is op.triton
    assert op.choose("torch", on_cuda) is op.torch
    assert op.choose("auto", torch.empty(1)) is op.torch


def test_kernels_that_are_wrong_are_refused_where_they_would_be_launched(right):
    assert (reason_against_kernels("triton", CUDA) is None) is right
    assert reason_against_kernels("triton", CPU) is None
    assert reason_against_kernels("auto", CUDA) is None
    assert reason_against_kernels("torch", CUDA) is None


def test_what_the_log_says(right):
    assert ("transposed copies were wrong" in how_it_is_rounded("auto", CUDA)) is not right
    assert how_it_is_rounded("torch", CUDA) == ""
    assert "cpu has no such products" in how_it_is_rounded("auto", CPU)


def test_the_choice_as_it_is():
    """Who sets it to True has run `tests/kernels/test_fp8_gpu.py` on a GPU, and changes docs/kernels.md."""
    assert fp8_choice.KERNELS_ARE_RIGHT_ON_CUDA is False
