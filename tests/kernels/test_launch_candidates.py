"""Every candidate of every choice is a launch that computes what the reference does, on small odd shapes."""

import functools
import importlib
import pkgutil

import pytest
import torch

from neox_hf import kernels
from neox_hf.kernels import AdamWRates, AdamWTensors, adamw_, gradient_norm, rotary
from neox_hf.kernels.launch_choice import LaunchChoice, launches_on
from neox_hf.kernels.softmax_rows import losses_and_gradient_
from tests.kernels.document_cases import check as check_document_attention
from tests.kernels.elementwise_cases import (
    check_bias_gelu,
    check_bias_residual,
    check_column_sums,
    check_dropout,
)
from tests.kernels.norm_cases import check as check_norm
from tests.kernels.norm_cases import inputs_of
from tests.kernels.rotary_back_cases import check_back

DEVICES = [
    *([] if torch.cuda.is_available() else ["cpu"]),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
"""Kernels are interpreted on the CPU only where there is no CUDA."""


def check_rotary(device):
    """In place, into a copy, and back with the sums: all against the reference."""
    cos, sin = torch.randn(2, 1, 5, 3, device=device).unbind()
    for dtype, in_place in ((torch.float32, True), (torch.float16, False)):
        qkv = torch.randn(2, 5, 3, 3, 20, device=device).to(dtype)
        bias = torch.zeros(180, device=device, dtype=dtype)
        results = {backend: _rotated(qkv, bias, cos, sin, in_place, backend) for backend in ("triton", "torch")}
        for ours, theirs in zip(*results.values(), strict=True):
            tolerance = 2e-3 if dtype == torch.float16 else 1e-5
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def _rotated(qkv, bias, cos, sin, in_place, backend):
    leaf, bias = qkv.clone().requires_grad_(), bias.clone().requires_grad_()
    parts = rotary(leaf * 1, cos, sin, in_place=in_place, bias=bias, backend=backend)
    torch.autograd.backward(parts, [part.detach() / 8 for part in parts])
    return *(part.detach() for part in parts), leaf.grad, bias.grad


def check_loss(device):
    logits, labels = torch.randn(5, 301, device=device), torch.tensor([0, 300, -100, 7, 8], device=device)
    exact = logits.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    wanted.sum().backward()
    losses = torch.empty(5, device=device)
    losses_and_gradient_(logits, labels, losses, words=301, ignore_index=-100)
    torch.testing.assert_close(losses, wanted.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits, exact.grad.float(), rtol=1e-5, atol=1e-7)


def check_adamw(device):
    """Steps of few bytes an element and of many."""
    for dtype in (torch.bfloat16, torch.float32):
        stepped = {backend: _stepped(device, dtype, backend) for backend in ("triton", "torch")}
        for ours, theirs in zip(*stepped.values(), strict=True):
            # The interpreter cuts bf16 off, where torch rounds.
            torch.testing.assert_close(ours, theirs, rtol=2**-6 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def _stepped(device, dtype, backend):
    generator = torch.Generator().manual_seed(0)
    draw = [[torch.randn(n, generator=generator).to(device, dtype) for n in (2051, 3)] for _ in range(4)]
    weights, gradients, exp_avgs, squares = draw
    steps = [torch.zeros((), device=device) for _ in weights]
    tensors = AdamWTensors(weights, gradients, None, exp_avgs, [x.abs() for x in squares], steps)
    adamw_(tensors, AdamWRates(1e-3, 0.9, 0.95, 1e-8, 0.1), backend=backend)
    return [*weights, *exp_avgs, *tensors.exp_avg_sqs]


def check_gradient_norm(device):
    gradients = [torch.randn(n, device=device) for n in (9001, 37, 1)]
    wanted = torch.cat(gradients).double().norm().item()
    assert gradient_norm(gradients, backend="triton").item() == pytest.approx(wanted, rel=1e-6)


def check_documents(device, size, dtype, kind="documents"):
    check_document_attention(device, dtype, kind, batch=2, sequence=70, count=1, size=size, tolerance=1.2)


CASES = {
    "bias_gelu": lambda device: check_bias_gelu(device, (7, 300), torch.float32, "erf", True),
    "gelu": lambda device: check_bias_gelu(device, (7, 300), torch.float16, "tanh", False),
    "residual": lambda device: check_bias_residual(device, (3, 1400), torch.float32, 2, True),
    "dropout": lambda device: check_dropout(device, (7, 300), torch.float32, 2, 0.25, torch.tensor([3]).to(device)),
    "column_sums": lambda device: check_column_sums(device, (37, 300), torch.float32),
    "layer_norm": lambda device: check_norm(
        "layer_norm", inputs_of("layer_norm", (9, 130), torch.float32, device=device)
    ),
    "wide_norm": lambda device: check_norm("rms_norm", inputs_of("rms_norm", (3, 2100), torch.float32, device=device)),
    "rotary": check_rotary,
    "rotary_back": lambda device: check_back((2, 37, 3, 3, 32), 8, 1, torch.float32, device),
    "loss": check_loss,
    "documents": lambda device: check_documents(device, 16, torch.float32),
    "documents, wider": lambda device: check_documents(device, 72, torch.float32),
    "documents, wide": lambda device: check_documents(device, 130, torch.float32, "holes"),
    "documents, half": lambda device: check_documents(device, 64, torch.float16),
    "documents, half, wider": lambda device: check_documents(device, 72, torch.float16),
    "documents, half, wide": lambda device: check_documents(device, 136, torch.float16, "holes"),
    "adamw": check_adamw,
    "gradient_norm": check_gradient_norm,
}


@functools.cache
def questions_of(name, device):
    """What the launches of a case ask."""
    return launches_on(torch.empty(0, device=device).device).asked_by(lambda: CASES[name](device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_every_candidate_computes_the_same(name, device):
    launches = launches_on(torch.empty(0, device=device).device)
    for question in questions_of(name, device):
        assert len(question.candidates) > 1, question.key
        assert len(set(question.candidates)) == len(question.candidates), question.key
        for candidate in question.candidates[1:]:
            with launches.trying(question, candidate):
                CASES[name](device)


@pytest.mark.parametrize("device", DEVICES)
def test_no_choice_is_left_out(device):
    names = [found.name for found in pkgutil.iter_modules(kernels.__path__) if found.name != "quack_epilogues"]
    modules = [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]
    found = {value for module in modules for value in vars(module).values() if isinstance(value, LaunchChoice)}
    names = [choice.op for choice in found]
    assert len(set(names)) == len(names)
    asked = {question.choice for name in CASES for question in questions_of(name, device)}
    assert {choice.op for choice in asked} == set(names)
