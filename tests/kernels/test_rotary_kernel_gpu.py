"""The Triton rotary embedding on a GPU, at sizes of real models."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from neox_hf.kernels import rotary
from neox_hf.modeling.recompute import selective_contexts
from tests.kernels import rotary_back_cases

pytestmark = pytest.mark.gpu

HEAD_AND_ROTARY_SIZES = [
    (32, 8),
    (64, 16),
    (80, 20),
    (96, 24),
    (128, 32),
    (256, 64),
    (64, 64),
    (80, 80),
    (96, 96),
    (128, 128),
]


def angles(length, rotated, batch):
    frequencies = 10000.0 ** -(torch.arange(0, rotated, 2, device="cuda") / rotated)
    positions = torch.arange(length, device="cuda") + 7 * torch.arange(batch, device="cuda")[:, None]
    t = positions[..., None] * frequencies
    return t.cos(), t.sin()


def run(backend, given, upstream, t, dtype, in_place=True):
    """Outputs, and the gradients of what was rotated and of the bias before it."""
    leaf = given.to(dtype).requires_grad_()
    bias = torch.zeros(given[0, 0].numel(), device="cuda", dtype=dtype, requires_grad=True)
    t = [a.to(torch.promote_types(dtype, a.dtype)) for a in t]
    outputs = rotary(leaf * 1.0, *t, in_place=in_place, bias=bias, backend=backend)
    torch.autograd.backward(outputs, [g.to(dtype) for g in upstream])
    return [x.detach() for x in (*outputs, leaf.grad, bias.grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "rotated"), HEAD_AND_ROTARY_SIZES)
@pytest.mark.parametrize(("batch", "sequence", "count", "rows"), [(2, 512, 16, 1), (3, 77, 5, 3), (1, 1, 71, 1)])
def test_no_further_from_fp64_than_the_reference(size, rotated, dtype, batch, sequence, count, rows):
    t = angles(sequence, rotated, rows)
    given = torch.randn(batch, sequence, count, 3, size, device="cuda").to(dtype)
    # As cuDNN returns them: dense, in the order batch, sequence, head.
    dense = torch.randn(3, batch, sequence, count, size, device="cuda").to(dtype)
    upstream = dense.transpose(2, 3).unbind()
    truth = run("torch", given, upstream, t, torch.float64)
    reference = run("torch", given, upstream, t, dtype)
    for in_place in (True, False):
        found = run("triton", given, upstream, t, dtype, in_place)
        for a, b, exact in zip(found, reference, truth, strict=True):
            tiny = 1e-6 * max(exact.abs().max().item(), 1.0)
            assert (a.double() - exact).abs().max() <= (b.double() - exact).abs().max() * 1.05 + tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "rotated"), rotary_back_cases.HEAD_AND_ROTARY_SIZES)
@pytest.mark.parametrize(("batch", "sequence", "count", "rows"), [(2, 2048, 16, 1), (3, 77, 5, 3), (1, 1, 71, 1)])
def test_a_buffer_turned_back_with_sums(batch, sequence, count, rows, size, rotated, dtype):
    rotary_back_cases.check_back((batch, sequence, count, 3, size), rotated, rows, dtype, torch.device("cuda"))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 1, 2, 0), (1, 3, 0, 2)])
def test_gradients_of_any_strides(order):
    t = angles(65, 32, 1)
    given = torch.randn(2, 65, 6, 3, 128, device="cuda", dtype=torch.bfloat16)
    dense = torch.randn(3, 2, 6, 65, 128, device="cuda", dtype=torch.bfloat16)
    strided = [g.permute(order).contiguous().permute([order.index(i) for i in range(4)]) for g in dense]
    assert torch.equal(*(run("triton", given, g, t, torch.bfloat16)[-2] for g in (dense.unbind(), strided)))


def test_a_buffer_of_more_than_2_to_the_31_elements():
    t = angles(2048, 32, 1)
    qkv = torch.zeros(192, 2048, 16, 3, 128, device="cuda", dtype=torch.bfloat16)  # 2.4e9 elements, 4.8 GB
    assert qkv.numel() > 2**31
    last = torch.randn(1, 2048, 16, 3, 128, device="cuda", dtype=torch.bfloat16)
    qkv[-1] = last[0]
    wanted = rotary(last, *t, backend="torch")
    for found in (rotary(qkv, *t, in_place=False, backend="triton"), rotary(qkv, *t, backend="triton")):
        for a, b in zip(found, wanted, strict=True):
            assert (a[-1:].float() - b.float()).abs().max() <= 2**-6 * b.abs().max()
        assert not found[0][0].any()


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(512, 3 * 512, device="cuda", dtype=torch.bfloat16)
        self.angles = angles(256, 32, 1)

    def forward(self, x):
        qkv = self.linear(x).view(*x.shape[:2], 4, 3, 128)
        query, key, value = rotary(qkv, *self.angles)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "how",
    [None, {"use_reentrant": False}, {"use_reentrant": False, "context_fn": selective_contexts}],
    ids=["bare", "whole", "selective"],
)
def test_gradients_however_it_is_run(how, compiled):
    torch.manual_seed(0)
    layer = Layer()
    x = torch.randn(2, 256, 512, device="cuda", dtype=torch.bfloat16)

    def gradients(run):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        run(leaf).float().pow(2).sum().backward()
        return leaf.grad.float(), layer.linear.weight.grad.float()

    def run(x):
        return layer(x) if how is None else checkpoint(layer, x, **how)

    wanted = gradients(layer)
    for a, b in zip(gradients(torch.compile(run, fullgraph=True) if compiled else run), wanted, strict=True):
        assert (a - b).norm() <= 0.01 * b.norm()


def test_is_captured_in_a_graph():
    t = angles(128, 32, 1)
    qkv = torch.randn(2, 128, 4, 3, 128, device="cuda", dtype=torch.bfloat16)
    wanted = rotary(qkv, *t, backend="torch")
    rotary(qkv.clone(), *t, backend="triton")
    source = qkv.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = rotary(source * 1.0, *t, backend="triton")
    graph.replay()
    for a, b in zip(found, wanted, strict=True):
        assert (a.float() - b.float()).abs().max() <= 2**-6 * b.abs().max()
