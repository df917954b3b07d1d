"""Looking words up, beside torch's in fp64."""

import torch
from torch.nn import functional as F

from neox_hf.kernels import embedding

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
