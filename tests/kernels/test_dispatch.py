"""One place chooses the implementation, and says no clearly."""

import logging
from types import SimpleNamespace

import pytest
import torch

from neox_hf import GPTNeoXConfig, GPTNeoXModel
from neox_hf.kernels import OPS, Op, describe_choice


def tensor_on(device: str, dtype: torch.dtype = torch.bfloat16) -> SimpleNamespace:
    """What of a tensor a choice reads; of devices, too, that this host may not have."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


CPU, CUDA, META = tensor_on("cpu"), tensor_on("cuda"), tensor_on("meta")
DOUBLE = tensor_on("cuda", torch.float64)


@pytest.fixture
def compiled(monkeypatch):
    """Kernels are compiled, as they are where there is CUDA."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def by_torch():
    return "torch"


def by_triton():
    return "triton"


REFERENCE_ONLY = Op("sum_of_squares", torch=by_torch)
WITH_KERNEL = Op("sum_of_squares", torch=by_torch, triton=by_triton)


@pytest.mark.parametrize(
    ("op", "backend", "x", "expected"),
    [
        (REFERENCE_ONLY, "auto", CPU, by_torch),
        (REFERENCE_ONLY, "auto", CUDA, by_torch),
        (REFERENCE_ONLY, "torch", CUDA, by_torch),
        (WITH_KERNEL, "auto", CPU, by_torch),
        (WITH_KERNEL, "auto", CUDA, by_triton),
        (WITH_KERNEL, "torch", CUDA, by_torch),
        (WITH_KERNEL, "auto", DOUBLE, by_torch),
        (WITH_KERNEL, "triton", CUDA, by_triton),
        (WITH_KERNEL, "triton", META, by_triton),
    ],
)
def test_choice(op, backend, x, expected, compiled):
    assert op.choose(backend, x) is expected


def test_the_interpreter_runs_kernels_on_the_cpu_when_asked(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert WITH_KERNEL.choose("triton", CPU) is by_triton
    assert WITH_KERNEL.choose("auto", CPU) is by_torch


def test_triton_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match=r"no Triton kernel is registered for sum_of_squares; kernels='auto'"):
        REFERENCE_ONLY.choose("triton", CUDA)


def test_triton_on_cpu_is_refused(compiled):
    with pytest.raises(ValueError, match=r"sum_of_squares was given a tensor on cpu"):
        WITH_KERNEL.choose("triton", CPU)


def test_triton_in_double_precision_is_refused(compiled):
    with pytest.raises(ValueError, match=r"given torch.float64; its kernel takes float32, bfloat16, float16"):
        WITH_KERNEL.choose("triton", DOUBLE)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"kernels='cuda' is unknown; choose one of auto, triton, torch"):
        REFERENCE_ONLY.choose("cuda", CPU)


def test_description_names_every_op():
    assert describe_choice([REFERENCE_ONLY], "auto") == "kernels=auto: sum_of_squares torch"
    assert describe_choice([WITH_KERNEL], "auto") == "kernels=auto: sum_of_squares triton on CUDA"
    assert describe_choice([WITH_KERNEL], "torch") == "kernels=torch: sum_of_squares torch"


def test_a_model_logs_its_choice_once(caplog):
    config = GPTNeoXConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    with caplog.at_level(logging.INFO, logger="neox_hf"):
        model = GPTNeoXModel(config)
        model(torch.zeros(1, 4, dtype=torch.int64))
    assert [record.getMessage() for record in caplog.records] == [describe_choice(OPS, "auto")]


def test_every_op_of_the_model_honours_the_choice(compiled):
    config = GPTNeoXConfig(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        kernels="triton",
    )
    with pytest.raises(ValueError, match="kernels='triton', but "):
        GPTNeoXModel(config)(torch.zeros(1, 4, dtype=torch.int64))
