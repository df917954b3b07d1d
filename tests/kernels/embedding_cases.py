"""Looking words up, beside torch's in fp64."""

import torch
from torch.nn import functional as F

from neox_hf.kernels import embedding
from neox_hf.kernels.weight_gradient import SumInGrad, sum_in

CASES = {
    "a few": (5, 7),
    "one block": (32, 5),
    "one more": (33, 50),
    "many of few": (500, 3),
    "few of many": (70, 1000),
}
"""Tokens and words."""


def words_of(tokens, words, device):
    return torch.randint(words, (tokens,), device=device, generator=torch.Generator(device).manual_seed(tokens))


def in_blocks(device):
    """Runs that end where blocks of 32 do, and one that goes on through a whole block."""
    ids = torch.cat(
        [torch.full((count,), word) for word, count in ((0, 32), (1, 33), (2, 31), (3, 80), (4, 1), (5, 64))]
    )
    return ids[torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(0))].to(device)


def gradient(ids, weight, upstream, backend):
    weight = weight.clone().requires_grad_()
    y = embedding(ids, weight, backend=backend) if backend else F.embedding(ids, weight)
    y.backward(upstream)
    return weight.grad


def check(ids, words, columns, dtype):
    """The gradient is no further from fp64's than torch's."""
    weight = torch.randn(words, columns, device=ids.device).to(dtype)
    upstream = torch.randn(*ids.shape, columns, device=ids.device).to(dtype)
    exact = gradient(ids, weight.double(), upstream.double(), None)
    ours, torchs = (gradient(ids, weight, upstream, backend).double() for backend in ("triton", None))
    size = exact.norm()
    assert (ours - exact).norm() <= 1.05 * (torchs - exact).norm() + 1e-6 * size
    assert not ours[exact.abs().sum(1) == 0].any()


def check_share(device, columns, why, dtype):
    """A part of a vocabulary gives the rows it has, takes their gradient, and knows nothing of other words."""
    words, first = 9, 4
    ids = torch.cat([in_blocks(device), in_blocks(device) + 50, in_blocks(device) - 50]).view(3, -1)
    weight = torch.nn.Parameter(torch.randn(words, columns, device=device).to(dtype), requires_grad=why != "frozen")
    if why in ("summed", "shared"):
        weight.grad_dtype = torch.float32
        sum_in(weight, SumInGrad())
    held = (ids >= first) & (ids < first + words)
    upstream = torch.randn(*ids.shape, columns, device=device).to(dtype)
    y = embedding(ids - first, weight, shared=why == "shared", of_share=True, backend="triton")
    assert torch.equal(y[held], weight[ids[held] - first])
    assert not y[~held].any()
    assert y.requires_grad is (why != "frozen")
    if why == "frozen":
        return
    y.backward(upstream)
    exact = torch.zeros(words, columns, dtype=torch.float64, device=device)
    exact.index_add_(0, ids[held] - first, upstream[held].double())
    assert weight.grad.dtype == (torch.float32 if why in ("summed", "shared") else dtype)
    torch.testing.assert_close(
        weight.grad.double(), exact, rtol=1e-5 if weight.grad.dtype.itemsize == 4 else 8e-3, atol=1e-4
    )
