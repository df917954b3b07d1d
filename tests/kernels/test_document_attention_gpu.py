"""Attention within documents and beside padding, on a GPU."""

import pytest
import torch

from neox_hf.kernels import document_attention
from neox_hf.kernels.document_spans import spans_of_positions
from neox_hf.kernels.qkv_gradient import heads
from tests.kernels.document_cases import KINDS, check, spans_and_seen

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("kind", ["documents", "holes"])
def test_no_further_from_fp64_than_written_out(kind, size, dtype):
    check("cuda", dtype, kind, batch=2, sequence=600, count=3, size=size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sequence", [3, 128, 333])
def test_over_odd_lengths(sequence, kind):
    check("cuda", torch.bfloat16, kind, batch=3, sequence=sequence, count=2, size=64)


def test_nothing_has_the_size_of_a_mask():
    length = 16384
    spans = spans_of_positions(torch.arange(length, device="cuda").remainder(1000)[None])
    qkv = torch.randn(1, length, 2, 3, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    document_attention(*heads(qkv), spans, scale=0.125).sum().backward()
    assert torch.cuda.max_memory_allocated() - held < 4 * qkv.nbytes < length**2


def test_the_same_input_gives_the_same_bits():
    spans, _ = spans_and_seen("documents", 2, 500, "cuda")
    qkv = torch.randn(2, 500, 3, 3, 64, device="cuda", dtype=torch.bfloat16)
    results = []
    for _ in range(2):
        leaf = qkv.clone().requires_grad_()
        output = document_attention(*heads(leaf), spans, scale=0.125)
        output.pow(2).sum().backward()
        results.append((output.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
