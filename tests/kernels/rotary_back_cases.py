"""Gradients of query, key and value turned back in one buffer, beside the reference in fp64."""

import torch

from neox_hf.kernels import rotary
from neox_hf.kernels.qkv_gradient import heads
from neox_hf.kernels.rotary_back import rotary_back_with_sums

HEAD_AND_ROTARY_SIZES = [(32, 8), (64, 16), (80, 20), (96, 24), (128, 32), (256, 64), (64, 64), (80, 80), (128, 8)]


def angles(length, rotated, batch, device):
    frequencies = 10000.0 ** -(torch.arange(0, rotated, 2, device=device) / rotated)
    positions = torch.arange(length, device=device) + 7 * torch.arange(batch, device=device)[:, None]
    t = positions[..., None] * frequencies
    return t.cos(), t.sin()


def turned_back(given, cos, sin):
    """The reference: the gradient of what was rotated."""
    leaf = torch.zeros_like(given, requires_grad=True)
    torch.autograd.backward(rotary(leaf, cos, sin, backend="torch"), heads(given))
    return leaf.grad


def check_back(shape, rotated, rows, dtype, device):
    """shape: of qkv [B, S, N, 3, D]. rows: of the angles, one or one a batch."""
    given = torch.randn(*shape, device=device).to(dtype)
    cos, sin = angles(shape[1], rotated, rows, device)
    exact = turned_back(given.double(), cos.double(), sin.double())
    reference = turned_back(given, cos, sin)
    buffer = given.clone()
    sums = rotary_back_with_sums(buffer, cos, sin, torch.float32)
    # The interpreter cuts bf16 off, where torch rounds.
    room = 1.05 if buffer.is_cuda or dtype == torch.float32 else 2.2
    assert (buffer.double() - exact).norm() <= (reference.double() - exact).norm() * room + 1e-6 * exact.norm()
    wanted = exact.sum((0, 1)).flatten()
    assert (sums.double() - wanted).norm() <= 1e-5 * exact.abs().sum((0, 1)).norm() + 1e-6
    kept = (..., slice(rotated, None))
    assert torch.equal(buffer[kept], given[kept])
    assert torch.equal(buffer[..., 2, :], given[..., 2, :])
