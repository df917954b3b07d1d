"""Softmax of attention scores, scaled and causal, for attention that is written out.

    y_ij = exp(z_ij) / sum over k <= i + K - Q of exp(z_ik),   z = scale scores [+ mask];   0 where j > i + K - Q

Shapes: scores [B, N heads, Q queries, K keys], mask [B or 1, N or 1, Q, K]; returns [B, N, Q, K] in the scores' dtype,
computed in fp32 and rounded once. The last query sees every key. A query that sees none, because K < Q or the mask is
-inf at all it could, has zeros.

    dscores_ij = scale y_ij (dy_ij - sum over k of y_ik dy_ik)

The kernels read what is seen, about half, and write all. Of the forward pass y alone is kept.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neox_hf.kernels.dispatch import Op
from neox_hf.kernels.language import tl, triton
from neox_hf.kernels.once_differentiable import once_differentiable
from neox_hf.kernels.registration import register, register_fake

TILE = 2048
"""Elements in a tile: several short rows, or one."""

LONGEST = 8192
"""Keys of a row that a program holds in its registers. It reads longer ones twice, the second time mostly from L2."""


def causal_softmax_reference(scores: Tensor, scale: float, mask: Tensor | None, overwrite: bool) -> Tensor:
    """torch's softmax; nothing is overwritten here."""
    queries, keys = scores.shape[-2:]
    z = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    if mask is not None:
        z = z + mask
    later = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(keys - queries + 1)
    z = z.masked_fill(later, -torch.inf)
    # Finite, so that a row that sees nothing has a softmax too; then zero.
    hidden = z == -torch.inf
    y = F.softmax(z.masked_fill(hidden, torch.finfo(z.dtype).min), dim=-1)
    return y.masked_fill(hidden, 0).to(scores.dtype)


@triton.jit
def _keys_seen(row, rows, queries, keys):
    """How many keys, from the first, each of the rows [ROWS] sees; none beyond the last row."""
    return tl.where(row < rows, row % queries + 1 + keys - queries, 0)


@triton.jit
def _worth_reading(key, keys, seen):
    """[ROWS, BLOCK]: what is seen, rounded up to 16 keys, so that the mask never splits a vector of 16 bytes."""
    return (key[None, :] // 16 * 16 < seen[:, None]) & (key[None, :] < keys)


@triton.jit
def _logits(scores, mask, at, mask_at, key, keys, seen, scale):
    """z of a tile [ROWS, BLOCK] in units of log 2, -inf where it is not seen."""
    read = _worth_reading(key, keys, seen)
    z = tl.load(scores + at + key[None, :], mask=read, other=0.0).to(tl.float32) * scale
    if mask is not None:
        z += tl.load(mask + mask_at + key[None, :], mask=read, other=0.0).to(tl.float32)
    return tl.where(key[None, :] < seen[:, None], z * 1.4426950408889634, -float("inf"))


@triton.jit
def _finite(largest):
    return tl.where(largest == -float("inf"), 0.0, largest)


@triton.jit
def _inverse(total):
    return tl.where(total > 0.0, 1.0 / total, 0.0)


@triton.jit
def _forward_kernel(
    scores,
    mask,
    y,
    scale,
    rows,
    queries,
    keys,
    heads,
    mask_batch,
    mask_head,
    mask_query,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """y may be scores: a program has read what it writes, and no other reads it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    seen = _keys_seen(row, rows, queries, keys)
    at = (row.to(tl.int64) * keys)[:, None]
    head, query = (row // queries).to(tl.int64), (row % queries).to(tl.int64)
    mask_at = (head // heads * mask_batch + head % heads * mask_head + query * mask_query)[:, None]
    key = tl.arange(0, BLOCK)
    if WHOLE:
        z = _logits(scores, mask, at, mask_at, key, keys, seen, scale)
        exponential = tl.exp2(z - _finite(tl.max(z, axis=1))[:, None])
        share = exponential * _inverse(tl.sum(exponential, axis=1))[:, None]
        tl.store(y + at + key[None, :], share, mask=(row < rows)[:, None] & (key[None, :] < keys))
    else:
        largest = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for first in range(0, keys, BLOCK):
            z = _logits(scores, mask, at, mask_at, first + key, keys, seen, scale)
            larger = tl.maximum(largest, tl.max(z, axis=1))
            total *= tl.exp2(largest - _finite(larger))
            total += tl.sum(tl.exp2(z - _finite(larger)[:, None]), axis=1)
            largest = larger
        for first in range(0, keys, BLOCK):
            z = _logits(scores, mask, at, mask_at, first + key, keys, seen, scale)
            share = tl.exp2(z - _finite(largest)[:, None]) * _inverse(total)[:, None]
            inside = (row < rows)[:, None] & (first + key[None, :] < keys)
            tl.store(y + at + first + key[None, :], share, mask=inside)


@triton.jit
def _load_pair(y, dy, at, key, keys, seen):
    """y and dy of a tile [ROWS, BLOCK] in fp32, zero where it is not seen, whatever dy is there."""
    read = _worth_reading(key, keys, seen)
    share = tl.load(y + at + key[None, :], mask=read, other=0.0).to(tl.float32)
    upstream = tl.load(dy + at + key[None, :], mask=read, other=0.0).to(tl.float32)
    return share, tl.where(key[None, :] < seen[:, None], upstream, 0.0)


@triton.jit
def _backward_kernel(
    y, dy, dx, scale, rows, queries, keys, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    seen = _keys_seen(row, rows, queries, keys)
    at = (row.to(tl.int64) * keys)[:, None]
    key = tl.arange(0, BLOCK)
    if WHOLE:
        share, upstream = _load_pair(y, dy, at, key, keys, seen)
        gradient = scale * share * (upstream - tl.sum(share * upstream, axis=1)[:, None])
        tl.store(dx + at + key[None, :], gradient, mask=(row < rows)[:, None] & (key[None, :] < keys))
    else:
        total = tl.zeros([ROWS], tl.float32)
        for first in range(0, keys, BLOCK):
            share, upstream = _load_pair(y, dy, at, first + key, keys, seen)
            total += tl.sum(share * upstream, axis=1)
        for first in range(0, keys, BLOCK):
            share, upstream = _load_pair(y, dy, at, first + key, keys, seen)
            inside = (row < rows)[:, None] & (first + key[None, :] < keys)
            gradient = scale * share * (upstream - total[:, None])
            tl.store(dx + at + first + key[None, :], gradient, mask=inside)


@dataclass(frozen=True)
class RowTiles:
    """How rows of `keys` elements are dealt out: `rows` whole rows to a program, or one, `block` elements at a time."""

    rows: int
    block: int
    whole: bool
    warps: int


@functools.cache
def row_tiles(keys: int, longest: int = LONGEST) -> RowTiles:
    """16 elements a lane, two vectors of 16 bytes in half precision."""
    whole = keys <= longest
    block = max(1 << (keys - 1).bit_length(), 16) if whole else longest // 2
    rows = max(TILE // block, 1)
    return RowTiles(rows, block, whole, warps=rows * block // 512)


def _launch_forward(scores: Tensor, scale: float, mask: Tensor | None, y: Tensor, longest: int = LONGEST) -> None:
    if scores.numel() == 0:
        return
    _, heads, queries, keys = scores.shape
    rows, tiles = scores.numel() // keys, row_tiles(keys, longest)
    strides = (0, 0, 0)
    if mask is not None:
        mask = (mask if mask.stride(-1) == 1 else mask.contiguous()).expand(scores.shape)
        strides = mask.stride()[:3]
    _forward_kernel[(-(-rows // tiles.rows),)](
        scores,
        mask,
        y,
        scale,
        rows,
        queries,
        keys,
        heads,
        *strides,
        ROWS=tiles.rows,
        BLOCK=tiles.block,
        WHOLE=tiles.whole,
        num_warps=tiles.warps,
    )


def _launch_backward(dy: Tensor, y: Tensor, scale: float, dx: Tensor, longest: int = LONGEST) -> None:
    if y.numel() == 0:
        return
    queries, keys = y.shape[-2:]
    rows, tiles = y.numel() // keys, row_tiles(keys, longest)
    _backward_kernel[(-(-rows // tiles.rows),)](
        y,
        dy,
        dx,
        scale,
        rows,
        queries,
        keys,
        ROWS=tiles.rows,
        BLOCK=tiles.block,
        WHOLE=tiles.whole,
        num_warps=tiles.warps,
    )


@register("causal_softmax_forward")
def _forward(scores: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    scores = scores.contiguous()
    y = torch.empty_like(scores)
    _launch_forward(scores, scale, mask, y)
    return y


@register_fake(_forward)
def _(scores: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


@register("causal_softmax_forward_", mutates=("scores",))
def _forward_(scores: Tensor, scale: float, mask: Tensor | None) -> None:
    """Into contiguous scores."""
    _launch_forward(scores, scale, mask, scores)


@register_fake(_forward_)
def _(scores: Tensor, scale: float, mask: Tensor | None) -> None:
    return None


@register("causal_softmax_backward")
def _backward(dy: Tensor, y: Tensor, scale: float) -> Tensor:
    dx = torch.empty_like(y)
    _launch_backward(dy.contiguous(), y, scale, dx)
    return dx


@register_fake(_backward)
def _(dy: Tensor, y: Tensor, scale: float) -> Tensor:
    return torch.empty_like(y)


class _CausalSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, scale: float, mask: Tensor | None, overwrite: bool) -> Tensor:
        if overwrite:
            _forward_(scores, scale, mask)
            ctx.mark_dirty(scores)
            y = scores
        else:
            y = _forward(scores, scale, mask)
        ctx.save_for_backward(y)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        return _backward(dy, y, ctx.scale), None, None, None


def causal_softmax_triton(scores: Tensor, scale: float, mask: Tensor | None, overwrite: bool) -> Tensor:
    """The kernels, differentiable in scores. A compiler plans its own memory: nothing is overwritten under it."""
    overwrite = overwrite and scores.is_contiguous() and not torch.compiler.is_compiling()
    return _CausalSoftmax.apply(scores, scale, mask, overwrite)


CAUSAL_SOFTMAX = Op("causal_softmax", torch=causal_softmax_reference, triton=causal_softmax_triton)


def causal_softmax(
    scores: Tensor, scale: float, mask: Tensor | None = None, *, overwrite: bool = False, backend: str = "auto"
) -> Tensor:
    """Causal softmax over the keys of scale x scores [B, N, Q, K] + mask [B or 1, N or 1, Q, K].

    mask: added in fp32, and constant; the causal mask need not be in it. overwrite: the result may take the place of
    the scores, where nothing else needs them (a matrix product does not need its result).

    Raises:
        ValueError: the scores have not four dimensions, or the mask does not fit them, is not of a floating dtype, or
            wants a gradient.
    """
    if scores.dim() != 4:
        raise ValueError(f"causal_softmax was given scores {list(scores.shape)}; it wants [B, N, Q, K]")
    if mask is not None:
        fits = mask.dim() == 4 and mask.shape[2:] == scores.shape[2:]
        if not fits or any(m not in (1, s) for m, s in zip(mask.shape[:2], scores.shape[:2], strict=True)):
            raise ValueError(
                f"causal_softmax was given a mask {list(mask.shape)} for scores {list(scores.shape)}; "
                "it wants [B or 1, N or 1, Q, K]"
            )
        if not mask.is_floating_point():
            raise ValueError(f"causal_softmax was given a mask of {mask.dtype}; it is added: 0 or -inf, say")
        if mask.requires_grad:
            raise ValueError("causal_softmax has no gradient for its mask; detach it")
    return CAUSAL_SOFTMAX.choose(backend, scores)(scores, scale, mask, overwrite)
