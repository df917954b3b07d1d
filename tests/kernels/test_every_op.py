"""What holds of every op that has gradients: inputs and upstream gradients may lie in memory as they like, be empty, be
on meta, and be seen by a compiler whose sizes vary."""

import pytest
import torch

from neox_hf import kernels
from tests.kernels.every_op_cases import HEADS, Sizes, by, check_layout, every_op, inputs, results, rotary
from tests.kernels.layouts import LAYOUTS, far_apart, laid_out

on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

COMPILERS = {"cpu": "aot_eager", "cuda": "inductor"}
"""What compiles kernels there: their interpreter is in no graph."""


@every_op
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_tensors_may_lie_in_memory_as_they_like(name, layout, backend):
    check_layout(name, [laid_out(layout, x) for x in inputs(name)], layout, backend, 2e-5)


@every_op
@on_each_device
@pytest.mark.parametrize("sizes", [Sizes(batch=0), Sizes(tokens=0)], ids=["no samples", "no tokens"])
def test_nothing_may_be_given(name, sizes, device):
    given = inputs(name, sizes, device)
    for found, wanted in zip(*(results(by(name, backend), given) for backend in ("triton", "torch")), strict=True):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert torch.equal(found, wanted)


@every_op
def test_on_meta_there_are_shapes(name):
    given = inputs(name)
    for found, wanted in zip(
        results(by(name, "triton"), [x.to("meta") for x in given]), results(by(name, "torch"), given), strict=True
    ):
        assert (found.shape, found.dtype, found.device.type) == (wanted.shape, wanted.dtype, "meta")


@every_op
@on_each_device
def test_a_compiler_takes_it_whole_at_sizes_that_vary(name, device):
    torch._dynamo.reset()
    compiled = torch.compile(by(name, "triton"), fullgraph=True, dynamic=True, backend=COMPILERS[device])
    for batch, tokens, layout in [(3, 5, "stepped"), (2, 7, "transposed")]:
        given = [laid_out(layout, x) for x in inputs(name, Sizes(batch, tokens), device)]
        for found, wanted in zip(results(compiled, given), results(by(name, "torch"), given), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_mask_with_rows_far_apart():
    scores, mask = torch.randn(1, 1, 3, 4).bfloat16(), torch.randn(1, 1, 3, 4).bfloat16()
    near, far = (kernels.causal_softmax(scores, 0.3, each, backend="triton") for each in (mask, far_apart(mask, 2)))
    assert torch.equal(near, far)


def test_rotary_takes_gradients_whose_heads_are_far_apart():
    (qkv,) = inputs("rotary")
    upstream = [torch.randn(qkv.shape[0], HEADS, qkv.shape[1], qkv.shape[-1]).bfloat16() for _ in range(3)]
    found = []
    for given in (upstream, [far_apart(upstream[0].transpose(0, 1), 0).transpose(0, 1), *upstream[1:]]):
        leaf = qkv.bfloat16().requires_grad_()
        found.append(*torch.autograd.grad(rotary(leaf, backend="triton"), leaf, given))
    assert torch.equal(*found)
