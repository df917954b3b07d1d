"""The language-model head and its loss in one op: no tensor of all tokens times all words ever exists.

    z = hidden weight^T
    loss = sum over tokens with label y of  ( log sum_v exp z_v  -  z_y )
    dloss/dz_v = exp(z_v - log sum_u exp z_u) - [v = y]

Shapes: hidden [N tokens, H]; weight [V, H], this rank's rows of the head; labels int64 [N]; returns a scalar in fp32
(fp64 for fp64). The same loss as `cross_entropy` of the logits z, where N is B x S.

Tokens are taken chunk by chunk: the logits of one chunk are made, turned into its loss and into their own gradient,
and used for both gradients, which the backward pass only multiplies by the loss's. So nothing of the size of the logits
outlives its chunk, and no product runs twice. Statistics and the weight's gradient are kept in fp32.

Where the vocabulary is split over ranks, each normalises over its own rows, and two small reductions a chunk make that
the softmax over all rows (Shoeybi et al., 2019, arXiv 1909.08053, section 3); logits never travel.
Source: gradients in the forward pass, by chunks: Hsu et al., 2024, arXiv 2410.10989.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from neox_hf.kernels.autocast import autocast_dtype, without_autocast
from neox_hf.kernels.cross_entropy import IGNORE_INDEX
from neox_hf.kernels.dispatch import Op

Reduce = Callable[[Tensor], Any]

LOGITS_AT_ONCE = 2**27
"""Logits in one chunk: for bf16 weights 12.3 bytes each were measured on a GPU, 1.7 GB of working memory."""

CHUNK_MULTIPLE = 128
"""Rows of a matrix product that fill its tiles."""


@dataclass(frozen=True)
class VocabularyShare:
    """Which words this rank's rows of the head stand for, and how it asks the other ranks about theirs.

    first_row: word of its first row. rows: how many rows are words; those after them are padding.
    all_max, all_sum: reduce a tensor over the ranks in place; None where this rank holds the whole vocabulary.
    """

    first_row: int
    rows: int
    all_max: Reduce | None = None
    all_sum: Reduce | None = None

    def locate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Column [C] of each label among this rank's rows, and whether it has one [C]; column 0 where it has not."""
        column = labels - self.first_row
        held = (column >= 0) & (column < self.rows)
        return column.where(held, 0), held


def default_chunk(tokens: int, rows: int) -> int:
    """Tokens in a chunk: as many as LOGITS_AT_ONCE allows, in a multiple of 128, all chunks of about one size."""
    most = max(LOGITS_AT_ONCE // rows // CHUNK_MULTIPLE, 1) * CHUNK_MULTIPLE
    chunks = max(math.ceil(tokens / most), 1)
    return max(math.ceil(tokens / chunks / CHUNK_MULTIPLE), 1) * CHUNK_MULTIPLE


def log_softmax_over_ranks(logits: Tensor, labels: Tensor, share: VocabularyShare) -> tuple[Tensor, Tensor]:
    """Log-probabilities of this rank's words [C, V], normalised over all ranks' words, and the losses [C].

    Overwrites the padding's logits. The loss of a label that no rank holds is NaN.
    """
    # Finite, so that a rank without any real row still has a softmax; its weight among the ranks is exp(-huge) = 0.
    logits[:, share.rows :] = torch.finfo(logits.dtype).min
    precise = torch.promote_types(logits.dtype, torch.float32)
    log_probabilities = F.log_softmax(logits, dim=-1, dtype=precise)
    column, held = share.locate(labels)
    if share.all_max is None:
        at_label = log_probabilities.gather(1, column[:, None]).squeeze(1)
        return log_probabilities, -at_label.where(held, math.nan)

    largest, place = logits.max(dim=-1, keepdim=True)
    own = largest.to(precise) - log_probabilities.gather(1, place)  # log-sum-exp over this rank's words [C, 1]
    highest = own.clone()
    share.all_max(highest)
    at_label = logits.gather(1, column[:, None]).to(precise)
    sums = torch.cat(((own - highest).exp(), at_label.where(held[:, None], 0), held[:, None].to(precise)), dim=1)
    share.all_sum(sums)
    total, label_logit, holders = sums.unbind(dim=1)
    everyone = highest.squeeze(1) + total.log()
    log_probabilities += own - everyone[:, None]
    return log_probabilities, (everyone - label_logit).where(holders > 0, math.nan)


def logits_gradient(log_probabilities: Tensor, labels: Tensor, share: VocabularyShare, out: Tensor) -> Tensor:
    """softmax - one-hot [C, V], into `out`. Subtracted before rounding: a probability near one would lose the rest."""
    column, held = share.locate(labels)
    at_label = log_probabilities.gather(1, column[:, None])
    torch.exp(log_probabilities, out=out)
    return out.scatter_(1, column[:, None], torch.where(held[:, None], at_label.expm1(), at_label.exp()).to(out.dtype))


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [V, H] += a^T b for a [C, V] and b [C, H], summed in the dtype of `total`, at least as wide as theirs."""
    if total.dtype == a.dtype:
        total.addmm_(a.t(), b)
    elif total.is_cuda:
        torch.addmm(total, a.t(), b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.t().to(total.dtype), b.to(total.dtype))


def chunked_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    share: VocabularyShare,
    chunk: int,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sum of the losses and, as far as `wanted`, its gradients in hidden [N, H] and weight [V, H]."""
    precise = torch.promote_types(weight.dtype, torch.float32)
    total = torch.zeros((), dtype=precise, device=hidden.device)
    for_hidden = torch.empty_like(hidden) if wanted[0] else None
    for_weight = torch.zeros_like(weight, dtype=precise) if wanted[1] else None
    for part in _slices(hidden.shape[0], chunk):
        ignored = labels[part] == ignore_index
        # Zeros in, so that such a token adds nothing to the weight's gradient, whatever its softmax.
        tokens = hidden[part].masked_fill(ignored[:, None], 0)
        known = labels[part].masked_fill(ignored, share.first_row)
        logits = torch.mm(tokens, weight.t())
        log_probabilities, losses = log_softmax_over_ranks(logits, known, share)
        total += losses.masked_fill(ignored, 0).sum()
        if not any(wanted):
            continue
        gradient = logits_gradient(log_probabilities, known, share, out=logits)
        if wanted[0]:
            torch.mm(gradient, weight, out=for_hidden[part]).masked_fill_(ignored[:, None], 0)
        if wanted[1]:
            add_product_(for_weight, gradient, tokens)
    return total, for_hidden, for_weight


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """`chunked_losses` with the gradients it has made already."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ignore_index: int,
        share: VocabularyShare,
        chunk: int,
        dtype: torch.dtype,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:2]
        operands = (hidden.detach().to(dtype), weight.detach().to(dtype))
        with without_autocast(hidden.device):
            total, *gradients = chunked_losses(*operands, labels, ignore_index, share, chunk, wanted)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = (hidden.dtype, _gradient_dtype(weight))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (
            None if gradient is None else _scaled(gradient, upstream, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None, None, None, None)


def _gradient_dtype(weight: Tensor) -> torch.dtype:
    """What autograd keeps of the weight's gradient: a leaf's `grad_dtype` may be wider than the weight."""
    wider = weight.grad_dtype if weight.is_leaf else weight.dtype
    return wider or torch.promote_types(weight.dtype, torch.float32)


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient x factor, rounded once. A factor without dimensions would first be rounded to the gradient's dtype."""
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor.reshape(1, 1), out=out)


@torch.compiler.disable  # a compiler would unroll the chunks, and split its graph at each reduction
def linear_cross_entropy_chunked(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, share: VocabularyShare, chunk: int
) -> Tensor:
    """Sum of the losses, differentiable in hidden and weight. Products run in the weight's dtype, or autocast's."""
    dtype = autocast_dtype(hidden.device) or weight.dtype
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _ChunkedLinearCrossEntropy.apply(hidden, weight, labels, ignore_index, share, chunk, dtype)
    operands = (hidden.to(dtype), weight.to(dtype))
    with without_autocast(hidden.device):
        return chunked_losses(*operands, labels, ignore_index, share, chunk, wanted=(False, False))[0]


LINEAR_CROSS_ENTROPY = Op("linear_cross_entropy", torch=linear_cross_entropy_chunked)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    first_row: int = 0,
    rows: int | None = None,
    chunk: int | None = None,
    all_max: Reduce | None = None,
    all_sum: Reduce | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sum over tokens of the loss of hidden [N, H] through the head weight [V, H].

    labels int64 [N] count words of the whole vocabulary; `ignore_index` counts for nothing. weight holds the words from
    `first_row` on; after `rows` of them (all, if not given) come rows of padding, which no probability or gradient
    reaches. chunk: tokens at a time. all_max and all_sum reduce a tensor in place over the ranks that share the
    vocabulary; each is called once a chunk on every rank, which all give the same hidden, labels and chunk. Every rank
    gets the same sum, and hidden's gradient through its own rows only: the gradients of all ranks add up to the whole.

    A weight in half precision gets its gradient rounded once, at the end, or not at all where `weight.grad_dtype` is
    fp32 (a leaf only: an operation between the parameter and this op rounds to the parameter's dtype).
    A label that no rank holds makes the loss NaN.

    Raises:
        ValueError: a chunk of no token, or one of the reductions without the other.
    """
    if (all_max is None) != (all_sum is None):
        given, missing = ("all_max", "all_sum") if all_sum is None else ("all_sum", "all_max")
        raise ValueError(f"linear_cross_entropy was given {given} without {missing}; a split vocabulary needs both")
    if chunk is None:
        chunk = default_chunk(hidden.shape[0], weight.shape[0])
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: a chunk has at least one token")
    share = VocabularyShare(first_row, weight.shape[0] if rows is None else rows, all_max, all_sum)
    implementation = LINEAR_CROSS_ENTROPY.choose(backend, hidden)
    return implementation(hidden, weight, labels.to(hidden.device), ignore_index, share, chunk)
