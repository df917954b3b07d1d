"""Causal attention on a GPU: whichever implementation is chosen for a head size has the right gradients there."""

import pytest
import torch

from neox_hf.kernels import causal_attention, rotary
from neox_hf.kernels.qkv_gradient import heads
from tests.kernels.attention_cases import check

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("batch", "sequence", "count"), [(2, 512, 4), (1, 333, 3), (3, 64, 2)])
def test_follows_the_equation_in_fp64(size, dtype, batch, sequence, count):
    check("cuda", dtype, batch, sequence, count, size)


def test_takes_views_and_gives_a_contiguous_output():
    qkv = torch.randn(2, 2048, 16, 3, 128, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    with torch.no_grad():
        output = causal_attention(*heads(qkv), scale=128**-0.5)
    assert output.is_contiguous()
    used = torch.cuda.max_memory_allocated() - held
    assert used < qkv.nbytes, f"{used} bytes for an output of {output.nbytes}: the inputs were copied"


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("size", [64, 80, 128])
def test_with_the_rotation_before_it(size, compiled):
    """The gradient of the projection, whichever way it comes together."""
    torch.manual_seed(0)
    t = torch.arange(128, device="cuda")[None, :, None] * 0.1 ** torch.arange(size // 8, device="cuda")
    weight = (torch.randn(3 * 2 * size, 64, device="cuda") / 8).requires_grad_()
    x = torch.randn(2, 128, 64, device="cuda")

    def attend(x, weight, backend):
        qkv = (x @ weight.t()).view(2, 128, 2, 3, size)
        return causal_attention(*rotary(qkv, t.cos(), t.sin(), backend=backend), scale=size**-0.5, backend=backend)

    def gradient(function, dtype, backend):
        leaf = weight.detach().to(dtype).requires_grad_()
        function(x.to(dtype), leaf, backend).double().pow(2).sum().backward()
        return leaf.grad.double()

    exact = gradient(attend, torch.float64, "torch")
    allowed = (gradient(attend, torch.bfloat16, "torch") - exact).norm()
    function = torch.compile(attend, fullgraph=True) if compiled else attend
    assert (gradient(function, torch.bfloat16, "auto") - exact).norm() <= allowed * 1.05
