"""Causal attention beside the equation written out in torch at the same dtype, both held against fp64."""

import torch

from neox_hf.kernels import attention_backend, causal_attention
from neox_hf.kernels.qkv_gradient import heads


def scores_of(query, key, scale):
    scores = scale * query @ key.transpose(-1, -2)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
    return scores.masked_fill(hidden, -torch.inf)


def written_out(query, key, value, scale):
    return (scores_of(query, key, scale).softmax(-1) @ value).transpose(1, 2)


def ours(query, key, value, scale):
    return causal_attention(query, key, value, scale=scale)


def run(function, qkv, upstream, dtype):
    """The output and the gradient of qkv, of a copy that no other run adds its gradient to."""
    leaf = qkv.to(dtype, copy=True).requires_grad_()
    output = function(*heads(leaf), leaf.shape[-1] ** -0.5)
    output.backward(upstream.to(dtype))
    return output.detach().double(), leaf.grad.double()


def check(device, dtype, batch, sequence, count, size):
    """Neither the output nor the gradient is further from fp64 than those of the equation written out."""
    qkv = torch.randn(batch, sequence, count, 3, size, device=device).to(dtype)
    upstream = torch.randn(batch, sequence, count, size, device=device).to(dtype)
    truth = run(written_out, qkv, upstream, torch.float64)
    reference = run(written_out, qkv, upstream, dtype)
    chosen = attention_backend(size, dtype, qkv.device)
    for name, a, b, exact in zip(
        ("output", "gradient"), run(ours, qkv, upstream, dtype), reference, truth, strict=True
    ):
        error, allowed = (a - exact).norm() / exact.norm(), (b - exact).norm() / exact.norm()
        assert error <= allowed * 1.05 + 1e-6, f"{name} of {chosen}: {error:.1e}, torch written out {allowed:.1e}"
