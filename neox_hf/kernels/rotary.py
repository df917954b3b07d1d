"""Partial rotary position embedding on the fused query-key-value projection, GPT-NeoX ("half") style.

With a = x[0 : R/2], b = x[R/2 : R] and c = x[R : D] of each query and key head, and the position's angles t [R/2]:

    a' = a cos t - b sin t        b' = b cos t + a sin t        c' = c

Shapes: qkv [B batch, S sequence, N heads, 3, D head size]; cos and sin [B or 1, S, R/2], fp32, where R <= D is the
rotated width; returns query, key and value, each [B, N, S, D].
Source: Su et al., 2021, arXiv 2104.09864; the halves, rather than adjacent pairs, are GPT-NeoX's (and the released
weights').
"""

import torch
from torch import Tensor

from neox_hf.kernels.dispatch import Op


def rotary_reference(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate in fp32 and round once. Splits, not slices: the gradient of a split is one concatenation."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, None, :], sin[:, :, None, None, :]
    query_key, value = qkv.split([2, 1], dim=3)
    rotated, passed = query_key.split([2 * half, qkv.shape[-1] - 2 * half], dim=-1)
    a, b = rotated.to(torch.promote_types(qkv.dtype, cos.dtype)).split(half, dim=-1)
    new_a = torch.addcmul(a * cos, b, sin, value=-1).to(qkv.dtype)
    new_b = torch.addcmul(b * cos, a, sin).to(qkv.dtype)
    query, key = torch.cat((new_a, new_b, passed), dim=-1).transpose(1, 2).unbind(dim=3)
    return query, key, value.squeeze(3).transpose(1, 2)


ROTARY = Op("rotary", torch=rotary_reference)


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Split qkv [B, S, N, 3, D] into query, key and value [B, N, S, D] and rotate the first two.

    Raises:
        ValueError: the angles are wider than a head.
    """
    if 2 * cos.shape[-1] > qkv.shape[-1]:
        raise ValueError(
            f"rotary width {2 * cos.shape[-1]} is over the head size {qkv.shape[-1]}; rotary_pct must be at most 1"
        )
    return ROTARY.choose(backend, qkv)(qkv, cos, sin)
