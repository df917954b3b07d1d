"""Looking words up, and the gradient of what they were looked up in, summed in one pass where it is to lie.

    y_t = weight[ids_t]        dweight[v] += sum over t with ids_t = v of dy_t

Shapes: ids [...], whole numbers below V; weight [V, H]; returns [..., H]. Of a share of a vocabulary, other ids are
words of somebody else's: y_t is 0, and no gradient comes of dy_t.

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

SHARE_TOKENS = 2
"""Rows that one program copies, where some are another rank's."""


@triton.jit
def _write(total, sums, at, inside, KEEP: tl.constexpr):
    if KEEP:
        sums += tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + at, sums, mask=inside)


@triton.jit
def _runs_kernel(
    gradient,
    factors,
    order,
    words,
    total,
    pieces,
    tokens,
    columns,
    rows,
    blocks,
    KEEP: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Runs of one word among sorted tokens: this block of tokens, this block of columns. Other words than the `rows` of
    `total` are read past.

    pieces [2 blocks of tokens, H]: of the run that came from the block before, and of one that goes on in the next.
    """
    block = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    first = block * TOKENS
    last = tl.minimum(first + TOKENS, tokens)
    word = tl.load(words + first)
    opened = tl.load(words + first - 1, mask=first > 0, other=-1) != word
    sums = tl.zeros([WIDTH], tl.float32)
    for place in range(first, last):
        here = column < tl.where((word >= 0) & (word < rows), columns, 0)
        token = tl.load(order + place).to(tl.int64)
        row = tl.load(gradient + token * columns + column, mask=here, other=0.0).to(tl.float32)
        if factors is not None:
            row *= tl.load(factors + token)
        sums += row
        following = tl.load(words + place + 1, mask=place + 1 < tokens, other=-1)
        if following != word or place + 1 == last:
            if following != word and opened:
                _write(total, sums, word.to(tl.int64) * columns + column, here, KEEP)
            else:
                tl.store(pieces + (2 * block + opened.to(tl.int32)).to(tl.int64) * columns + column, sums, mask=here)
            sums = tl.zeros([WIDTH], tl.float32)
            opened = following != word
            word = following


@triton.jit
def _join_kernel(
    words, ends, total, pieces, tokens, columns, rows, blocks,
    KEEP: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The run that this block opens and others go on with, if there is one, from its pieces. ends: where the run of
    each block's last word ends."""
    block = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    first = block * TOKENS
    last = tl.minimum(first + TOKENS, tokens)
    word, end = tl.load(words + last - 1), tl.load(ends + block)
    opened = (tl.load(words + first) != word) | (tl.load(words + first - 1, mask=first > 0, other=-1) != word)
    if opened and end > last and word >= 0 and word < rows:
        sums = tl.load(pieces + (2 * block + 1).to(tl.int64) * columns + column, mask=inside, other=0.0)
        for later in range(block + 1, (end - 1) // TOKENS + 1):
            sums += tl.load(pieces + tl.cast(2 * later, tl.int64) * columns + column, mask=inside, other=0.0)
        _write(total, sums, word.to(tl.int64) * columns + column, inside, KEEP)


@triton.jit
def _share_kernel(ids, weight, y, tokens, columns, rows, blocks, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of `weight` for this block of tokens and of columns, zeros for words that it has not."""
    token = tl.program_id(0) // blocks * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    word = tl.load(ids + token, mask=token < tokens, other=-1)
    held = inside & (word >= 0)[:, None] & (word < rows)[:, None]
    found = tl.load(weight + word.to(tl.int64)[:, None] * columns + column[None, :], mask=held, other=0.0)
    tl.store(y + token.to(tl.int64)[:, None] * columns + column[None, :], found, mask=inside)


@register("embedding_of_share")
def embedding_of_share(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight [V, H] by ids [...], zeros for those that are no row: [..., H]."""
    ids, weight = ids.contiguous(), weight.contiguous()
    rows, columns = weight.shape
    y = weight.new_empty(*ids.shape, columns)
    if y.numel() == 0:
        return y
    width = block_width(columns)
    blocks, slabs = -(-columns // width), -(-ids.numel() // SHARE_TOKENS)
    how = {"TOKENS": SHARE_TOKENS, "WIDTH": width, "num_warps": max(width // WARP_COLUMNS, 1)}
    _share_kernel[(slabs * blocks,)](ids, weight, y, ids.numel(), columns, rows, blocks, **how)
    return y


@register_fake(embedding_of_share)
def _(ids: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


@register("embedding_gradient", mutates=("total",))
def embedding_gradient_(
    total: Tensor, ids: Tensor, gradient: Tensor, keep: bool, factors: Tensor | None = None
) -> None:
    """total [V, H] (+)= the gradient of a weight that `ids` [...] were looked up in, from that of the result [..., H].

    Ids that are no word of these give nothing. keep: whether there is something in `total` yet. factors: fp32 [...], of
    which each is multiplied with its row of `gradient` first.
    """
    if not total.is_contiguous():  # as that of a transposed weight
        whole = total.contiguous()
        embedding_gradient_(whole, ids, gradient, keep, factors)
        total.copy_(whole)
        return
    if not keep:
        total.zero_()
    if gradient.numel() == 0:
        return
    words, order = torch.sort(ids.flatten().to(torch.int32), stable=True)
    tokens, (rows, columns) = words.numel(), total.shape
    width = block_width(columns)
    blocks, slabs = -(-columns // width), -(-tokens // BLOCK_TOKENS)
    pieces = torch.empty(2 * slabs, columns, dtype=torch.float32, device=total.device)
    how = {"KEEP": keep, "TOKENS": BLOCK_TOKENS, "WIDTH": width, "num_warps": max(width // WARP_COLUMNS, 1)}
    rows_added = (gradient.contiguous(), None if factors is None else factors.contiguous())
    _runs_kernel[(slabs * blocks,)](*rows_added, order, words, total, pieces, tokens, columns, rows, blocks, **how)
    last_words = words[BLOCK_TOKENS - 1 :: BLOCK_TOKENS].contiguous()
    if last_words.numel():
        ends = torch.searchsorted(words, last_words, right=True, out_int32=True)
        _join_kernel[(ends.numel() * blocks,)](words, ends, total, pieces, tokens, columns, rows, blocks, **how)


@register_fake(embedding_gradient_)
def _(total: Tensor, ids: Tensor, gradient: Tensor, keep: bool, factors: Tensor | None = None) -> None:
    return None


class _Embedding(torch.autograd.Function):
    """Gives the weight's gradient to autograd."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, of_share: bool) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(ids)
        return _look_up(ids, weight, of_share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        (ids,), weight = ctx.saved_tensors, ctx.weight
        total = torch.empty_like(weight, dtype=gradient_dtype(weight))
        embedding_gradient_(total, ids, gradient, False)
        return None, total, None


class _SummingEmbedding(torch.autograd.Function):
    """Has it added by `add_by`. The weight takes part detached, for autograd would call its hooks for a gradient that
    is not there; so it is `anchor` that the result depends on."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, of_share: bool, add_by: Callable[[AddInto], None], anchor: Tensor
    ) -> Tensor:
        ctx.add_by = add_by
        ctx.save_for_backward(ids)
        return _look_up(ids, weight, of_share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        ctx.add_by(lambda total, keep: embedding_gradient_(total, ids, gradient, keep))
        return (None,) * 5


def _look_up(ids: Tensor, weight: Tensor, of_share: bool) -> Tensor:
    return embedding_of_share(ids, weight) if of_share else F.embedding(ids, weight)


def embedding_reference(ids: Tensor, weight: Tensor, shared: bool, of_share: bool) -> Tensor:
    """torch's, whose gradient is autograd's to sum."""
    if not of_share:
        return F.embedding(ids, weight)
    elsewhere = (ids < 0) | (ids >= weight.shape[0])
    found = F.embedding(ids.masked_fill(elsewhere, 0), weight)
    return found.masked_fill(elsewhere[..., None], 0)


def embedding_triton(ids: Tensor, weight: Tensor, shared: bool, of_share: bool) -> Tensor:
    """Where a compiler would look into it, torch's own; nothing but the look-up where nothing is trained."""
    if torch.compiler.is_compiling():
        return embedding_reference(ids, weight, shared, of_share)
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return _look_up(ids, weight, of_share)
    total = None if shared else sum_of(weight)
    if total is None:
        return _Embedding.apply(ids, weight, of_share)
    anchor = weight.new_empty(0).requires_grad_()
    return _SummingEmbedding.apply(ids, weight.detach(), of_share, partial(total.add_by, weight), anchor)


EMBEDDING = Op("embedding", torch=embedding_reference, triton=embedding_triton)


def embedding(
    ids: Tensor, weight: Tensor, *, shared: bool = False, of_share: bool = False, backend: str = "auto"
) -> Tensor:
    """Rows of weight [V, H] by ids [...]: [..., H]. A weight that carries a `GradientSum` has its gradient added there,
    unless it is `shared` with something else, whose gradient autograd has to wait for. of_share: the weight is part of
    a vocabulary, and ids below 0 or from V on are words of another part.

    Raises:
        ValueError: `backend` is unknown, or `triton` where it cannot run.
    """
    return EMBEDDING.choose(backend, weight)(ids, weight, shared, of_share)
