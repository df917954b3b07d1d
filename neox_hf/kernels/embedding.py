"""Looking words up, and the gradient of what they were looked up in, summed in one pass where it is to lie.

    y_t = weight[ids_t]        dweight[v] += sum over t with ids_t = v of dy_t

Shapes: ids [...], whole numbers below V; weight [V, H]; returns [..., H].

torch sums a gradient in the weight's dtype, casts it, and adds it to what there is: passes over memory the size of the
weight, most rows of which no word of a batch asks for. Here tokens are sorted by word, and a program adds up the rows
of one block of them in fp32, in their order. A word's run of tokens that lies within a block is written where it
belongs; pieces of runs that go on in the next block are put down, and a second, small kernel adds those up. No atomics:
the same input gives the same bits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neox_hf.kernels.column_sums import WARP_COLUMNS, block_width
from neox_hf.kernels.dispatch import Op
from neox_hf.kernels.gradient_dtype import gradient_dtype
from neox_hf.kernels.language import tl, triton
from neox_hf.kernels.once_differentiable import once_differentiable
from neox_hf.kernels.registration import register, register_fake
from neox_hf.kernels.weight_gradient import AddInto, sum_of

BLOCK_TOKENS = 32
"""Tokens that one program adds up, one after the other."""


@triton.jit
def _write(total, sums, at, inside, KEEP: tl.constexpr):
    if KEEP:
        sums += tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + at, sums, mask=inside)


@triton.jit
def _runs_kernel(
    gradient,
    order,
    words,
    total,
    pieces,
    tokens,
    columns,
    blocks,
    KEEP: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Runs of one word among sorted tokens: this block of tokens, this block of columns.

    pieces [2 blocks of tokens, H]: of the run that came from the block before, and of one that goes on in the next.
    """
    block = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    first = block * TOKENS
    last = tl.minimum(first + TOKENS, tokens)
    word = tl.load(words + first)
    opened = tl.load(words + first - 1, mask=first > 0, other=-1) != word
    sums = tl.zeros([WIDTH], tl.float32)
    for place in range(first, last):
        token = tl.load(order + place).to(tl.int64)
        sums += tl.load(gradient + token * columns + column, mask=inside, other=0.0).to(tl.float32)
        following = tl.load(words + place + 1, mask=place + 1 < tokens, other=-1)
        if following != word or place + 1 == last:
            if following != word and opened:
                _write(total, sums, word.to(tl.int64) * columns + column, inside, KEEP)
            else:
                tl.store(pieces + (2 * block + opened.to(tl.int32)).to(tl.int64) * columns + column, sums, mask=inside)
            sums = tl.zeros([WIDTH], tl.float32)
            opened = following != word
            word = following


@triton.jit
def _join_kernel(
    words, ends, total, pieces, tokens, columns, blocks, KEEP: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr
):
    """The run that this block opens and others go on with, if there is one, from its pieces. ends: where the run of
    each block's last word ends."""
    block = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    first = block * TOKENS
    last = tl.minimum(first + TOKENS, tokens)
    word, end = tl.load(words + last - 1), tl.load(ends + block)
    opened = (tl.load(words + first) != word) | (tl.load(words + first - 1, mask=first > 0, other=-1) != word)
    if opened and end > last:
        sums = tl.load(pieces + (2 * block + 1).to(tl.int64) * columns + column, mask=inside, other=0.0)
        for later in range(block + 1, (end - 1) // TOKENS + 1):
            sums += tl.load(pieces + tl.cast(2 * later, tl.int64) * columns + column, mask=inside, other=0.0)
        _write(total, sums, word.to(tl.int64) * columns + column, inside, KEEP)


@register("embedding_gradient", mutates=("total",))
def embedding_gradient_(total: Tensor, ids: Tensor, gradient: Tensor, keep: bool) -> None:
    """total [V, H] (+)= the gradient of a weight that `ids` [...] were looked up in, from that of the result [..., H].

    keep: whether there is something in `total` yet.
    """
    if not keep:
        total.zero_()
    if gradient.numel() == 0:
        return
    words, order = torch.sort(ids.flatten().to(torch.int32), stable=True)
    tokens, columns = words.numel(), total.shape[1]
    width = block_width(columns)
    blocks, rows = -(-columns // width), -(-tokens // BLOCK_TOKENS)
    pieces = torch.empty(2 * rows, columns, dtype=torch.float32, device=total.device)
    how = {"KEEP": keep, "TOKENS": BLOCK_TOKENS, "WIDTH": width, "num_warps": max(width // WARP_COLUMNS, 1)}
    gradient = gradient.contiguous()
    _runs_kernel[(rows * blocks,)](gradient, order, words, total, pieces, tokens, columns, blocks, **how)
    last_words = words[BLOCK_TOKENS - 1 :: BLOCK_TOKENS].contiguous()
    if last_words.numel():
        ends = torch.searchsorted(words, last_words, right=True, out_int32=True)
        _join_kernel[(ends.numel() * blocks,)](words, ends, total, pieces, tokens, columns, blocks, **how)


@register_fake(embedding_gradient_)
def _(total: Tensor, ids: Tensor, gradient: Tensor, keep: bool) -> None:
    return None


class _Embedding(torch.autograd.Function):
    """Gives the weight's gradient to autograd."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (ids,), weight = ctx.saved_tensors, ctx.weight
        total = torch.empty_like(weight, dtype=gradient_dtype(weight))
        embedding_gradient_(total, ids, gradient, False)
        return None, total


class _SummingEmbedding(torch.autograd.Function):
    """Has it added by `add_by`. The weight takes part detached, for autograd would call its hooks for a gradient that
    is not there; so it is `anchor` that the result depends on."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, add_by: Callable[[AddInto], None], anchor: Tensor) -> Tensor:
        ctx.add_by = add_by
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        ctx.add_by(lambda total, keep: embedding_gradient_(total, ids, gradient, keep))
        return (None,) * 4


def embedding_reference(ids: Tensor, weight: Tensor, shared: bool) -> Tensor:
    """torch's, whose gradient is autograd's to sum."""
    return F.embedding(ids, weight)


def embedding_triton(ids: Tensor, weight: Tensor, shared: bool) -> Tensor:
    """Where nothing is trained, or a compiler would look into it, torch's own."""
    if not (weight.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return F.embedding(ids, weight)
    total = None if shared else sum_of(weight)
    if total is None:
        return _Embedding.apply(ids, weight)
    anchor = weight.new_empty(0).requires_grad_()
    return _SummingEmbedding.apply(ids, weight.detach(), partial(total.add_by, weight), anchor)


EMBEDDING = Op("embedding", torch=embedding_reference, triton=embedding_triton)


def embedding(ids: Tensor, weight: Tensor, *, shared: bool = False, backend: str = "auto") -> Tensor:
    """Rows of weight [V, H] by ids [...]: [..., H]. A weight that carries a `GradientSum` has its gradient added there,
    unless it is `shared` with something else, whose gradient autograd has to wait for.

    Raises:
        ValueError: `backend` is unknown, or `triton` where it cannot run.
    """
    return EMBEDDING.choose(backend, weight)(ids, weight, shared)
