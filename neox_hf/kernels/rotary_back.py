"""The gradient of query, key and value turned back where it lies, and its sums over tokens: the bias's gradient.

With a = x[0 : R/2], b = x[R/2 : R] of each query and key head, and the position's angles t [R/2]:

    a' = a cos t + b sin t        b' = b cos t - a sin t

Shapes: B batch, S sequence, N heads, D head size, R <= D rotated width. Everything is read once, and what is turned is
written. The forward pass, and gradients that lie apart, are `rotary.py`'s.
"""

import torch
from torch import Tensor

from neox_hf.kernels.column_sums import column_sums, finish_column_sums
from neox_hf.kernels.devices import multiprocessors
from neox_hf.kernels.language import tl, triton
from neox_hf.kernels.registration import register, register_fake
from neox_hf.kernels.rotary_launches import BACK_WITH_SUMS, tile, without_gaps


@triton.jit
def _back_kernel(
    gradient, cos, sin, partial, tokens, sequence, angles_of_batch, rows,
    SIZE: tl.constexpr, HALF: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_HALF: tl.constexpr, UNDER_WAY: tl.constexpr,
):  # fmt: skip
    """gradient [tokens, rows = 3 N, D] in place, of blocks of tokens [T] and rows [R]; this program's sums over every
    num_programs-th block of tokens go to partial [programs, rows, D]."""
    row = (tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[None, :, None]
    column = tl.arange(0, BLOCK_SIZE)[None, None, :]
    j = tl.arange(0, BLOCK_HALF)
    pair = j[None, None, :]
    turns = row % 3 < 2
    in_row = (row < rows) & (column < SIZE)
    paired = (row < rows) & turns & (pair < HALF)
    stays = in_row & ((column >= 2 * HALF) | (row % 3 == 2))
    sums = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS, BLOCK_SIZE], tl.float32)
    of_a = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS, BLOCK_HALF], tl.float32)
    of_b = of_a
    for block in tl.range(tl.program_id(0), tl.cdiv(tokens, BLOCK_TOKENS), tl.num_programs(0), num_stages=UNDER_WAY):
        token = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        there = (token < tokens)[:, None, None]
        start = gradient + token.to(tl.int64)[:, None, None] * (rows * SIZE) + row * SIZE
        # Whole lines: those that turn are then in the cache.
        all_of_it = tl.load(start + column, mask=there & in_row, other=0.0)
        sums += tl.where(stays, all_of_it.to(tl.float32), 0.0)
        here = (token < tokens)[:, None] & (j < HALF)[None, :]
        angle = ((token // sequence) * angles_of_batch + (token % sequence) * HALF)[:, None] + j[None, :]
        c = tl.load(cos + angle, mask=here, other=1.0).to(tl.float32)[:, None, :]
        s = tl.load(sin + angle, mask=here, other=0.0).to(tl.float32)[:, None, :]
        a = tl.load(start + pair, mask=there & paired, other=0.0).to(tl.float32)
        b = tl.load(start + pair + HALF, mask=there & paired, other=0.0).to(tl.float32)
        new_a, new_b = a * c + b * s, b * c - a * s
        tl.store(start + pair, new_a.to(gradient.dtype.element_ty), mask=there & paired)
        tl.store(start + pair + HALF, new_b.to(gradient.dtype.element_ty), mask=there & paired)
        of_a += new_a
        of_b += new_b
    to = partial + tl.program_id(0) * (rows * SIZE) + row * SIZE
    tl.store(to + column, tl.sum(sums, axis=0, keep_dims=True), mask=stays)
    tl.store(to + pair, tl.sum(of_a, axis=0, keep_dims=True), mask=paired)
    tl.store(to + pair + HALF, tl.sum(of_b, axis=0, keep_dims=True), mask=paired)


@register("rotary_back_with_sums", mutates=("gradient",))
def rotary_back_with_sums(gradient: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn query and key back inside the contiguous gradient [B, S, N, 3, D], by cos and sin fp32 [B or 1, S, R/2].

    Returns the sums [N x 3 x D] over all tokens.
    """
    batch, sequence, count, _, size = gradient.shape
    rows, tokens, half = 3 * count, batch * sequence, cos.shape[-1]
    if gradient.numel() == 0 or half == 0:
        return column_sums(gradient.flatten(2), dtype)
    cos, sin, angles_of_batch = without_gaps(cos, sin)
    launch = BACK_WITH_SUMS.chosen(gradient.device, gradient.dtype, count, size, half, gradient.element_size())
    block_tokens, block_rows, block_size = tile(size, rows, launch.elements)
    # Fewer elements than lanes would be loaded by several, of which one stores them, perhaps before another loads.
    block_half = max(1 << (half - 1).bit_length(), 32 * launch.warps // (block_tokens * block_rows))
    blocks, programs = -(-rows // block_rows), -(-tokens // block_tokens)
    programs = min(programs, max(multiprocessors(gradient.device) * launch.programs // blocks, 1))
    partial = gradient.new_empty(programs, rows * size, dtype=torch.float32)
    _back_kernel[(programs, blocks)](
        gradient,
        cos,
        sin,
        partial,
        tokens,
        sequence,
        angles_of_batch,
        rows,
        SIZE=size,
        HALF=half,
        BLOCK_TOKENS=block_tokens,
        BLOCK_ROWS=block_rows,
        BLOCK_SIZE=block_size,
        BLOCK_HALF=block_half,
        UNDER_WAY=launch.under_way,
        num_warps=launch.warps,
    )
    return finish_column_sums(partial, dtype)


@register_fake(rotary_back_with_sums)
def _(gradient: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(gradient.shape[2:].numel(), dtype=dtype)
