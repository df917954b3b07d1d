"""Head and loss chunk by chunk of tokens: the logits of one chunk are made, turned into its loss and into their own
gradient, and used for the gradients of hidden and weight.

Shapes: hidden [N tokens, H]; weight [V, H], this rank's rows of the head; labels int64 [N].
Nothing of the size of the logits outlives its chunk, and no product runs twice. Statistics and the weight's gradient
are kept in fp32. With Triton a chunk is three products and one pass over its logits (`softmax_rows.py`), nothing else.
Source: gradients in the forward pass, by chunks: Hsu et al., 2024, arXiv 2410.10989.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from neox_hf.kernels.product import product_, torch_product_
from neox_hf.kernels.softmax_rows import (
    losses_and_gradient_,
    losses_from_statistics,
    row_statistics,
    rows_gradient,
    sum_of_losses,
)
from neox_hf.kernels.vocabulary_share import (
    VocabularyShare,
    log_softmax_over_ranks,
    logits_gradient,
)
from neox_hf.kernels.weight_gradient import add_product_

LOGITS_AT_ONCE = 2**27
"""Logits in one chunk of the reference: 12.3 bytes each were measured on a GPU in bf16, 1.7 GB of working memory."""

KERNEL_BYTES_AT_ONCE = 400 * 2**20
"""Logits of one chunk with Triton, which needs no other memory of that size: 4096 tokens x 50304 words in bf16."""

CHUNK_MULTIPLE = 128
"""Rows of a matrix product that fill its tiles."""

ROW_ALIGNMENT = 128
"""Bytes that a row of logits begins at a multiple of, for vector loads and the tensor cores."""


class Job(NamedTuple):
    """What is asked for, besides the tensors: see `linear_cross_entropy`.

    chunk: tokens at a time; None: as suits the implementation. wanted: the gradients of hidden and weight.
    """

    ignore_index: int
    share: VocabularyShare
    chunk: int | None
    z_loss: float
    wanted: tuple[bool, bool] = (False, False)


Result = tuple[Tensor, Tensor | None, Tensor | None]
"""Sum of the losses and, as far as wanted, its gradients in hidden [N, H] and in weight [V, H]. Both in fp32, but that
hidden's has its own dtype where a factor makes it final."""


def default_chunk(tokens: int, rows: int, logits_at_once: int = LOGITS_AT_ONCE) -> int:
    """Tokens in a chunk: as many as `logits_at_once` allows, in a multiple of 128, all chunks of about one size."""
    most = max(logits_at_once // rows // CHUNK_MULTIPLE, 1) * CHUNK_MULTIPLE
    chunks = max(_quotient_above(tokens, most), 1)
    return max(_quotient_above(tokens, chunks * CHUNK_MULTIPLE), 1) * CHUNK_MULTIPLE


def _quotient_above(a: int, b: int) -> int:
    return -(-a // b)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient x factor, rounded once. A factor without dimensions would first be rounded to the gradient's dtype."""
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor.reshape(1, 1), out=out)


def chunked_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, factor: Tensor | None, into: Tensor | None, job: Job
) -> Result:
    """The plain-torch reference. Gradients come times `factor`, where given, and the weight's is added to `into`."""
    precise = torch.promote_types(weight.dtype, torch.float32)
    total = torch.zeros((), dtype=precise, device=hidden.device)
    for_hidden = empty_gradient(hidden, factor) if job.wanted[0] else None
    for_weight = weight.new_zeros(weight.shape, dtype=precise) if job.wanted[1] else None
    for part in chunks_of(hidden.shape[0], job.chunk):
        ignored = labels[part] == job.ignore_index
        # Zeros in, so that such a token adds nothing to the weight's gradient, whatever its softmax.
        tokens = hidden[part].masked_fill(ignored[:, None], 0)
        known = labels[part].masked_fill(ignored, job.share.first_row)
        logits = torch.mm(tokens, weight.t())
        normalised = log_softmax_over_ranks(logits, known, job.share)
        losses = normalised.losses + job.z_loss * normalised.lse.square() if job.z_loss else normalised.losses
        total += losses.masked_fill(ignored, 0).sum()
        if not any(job.wanted):
            continue
        logits_gradient(normalised, known, job.share, job.z_loss, out=logits)
        if job.wanted[0]:
            gradient = torch_product_(torch.empty_like(tokens, dtype=precise), logits, weight)
            gradient = gradient if factor is None else gradient.mul_(factor)
            for_hidden[part] = gradient.masked_fill_(ignored[:, None], 0)
        if job.wanted[1]:
            add_product_(for_weight, logits, tokens, backend="torch")
    if factor is not None and for_weight is not None:
        for_weight *= factor
    if into is not None and for_weight is not None:
        return total, for_hidden, into.add_(for_weight)
    return total, for_hidden, for_weight


def chunked_losses_kernel(
    hidden: Tensor, weight: Tensor, labels: Tensor, factor: Tensor | None, into: Tensor | None, job: Job
) -> Result:
    """`chunked_losses` in Triton. What an ignored token holds must be finite here, as in a product with the head."""
    tokens, rows = hidden.shape[0], weight.shape[0]
    buffer = _aligned_rows(hidden, min(job.chunk, tokens), rows)
    losses = hidden.new_empty(tokens, dtype=torch.float32)
    for_hidden = empty_gradient(hidden, factor) if job.wanted[0] else None
    for_weight = sum_of_products(weight, into, tokens) if job.wanted[1] else None
    for part in chunks_of(tokens, job.chunk):
        known = labels[part]
        logits = product_(buffer[: known.shape[0], :rows], hidden[part], weight.t())
        _losses_and_gradient_(buffer[: known.shape[0]], known, losses[part], factor, job)
        if job.wanted[0]:
            product_(for_hidden[part], logits, weight)
        if job.wanted[1]:
            add_product_(for_weight, logits, hidden[part], keep=into is not None or part.start > 0)
    return sum_of_losses(losses), for_hidden, for_weight


def _losses_and_gradient_(logits: Tensor, labels: Tensor, losses: Tensor, factor: Tensor | None, job: Job) -> None:
    """Losses [C] of this chunk and, where one is wanted, the gradient in place of the logits [C, V or more]."""
    share, wanted = job.share, any(job.wanted)
    place = {"words": share.rows, "first_word": share.first_row, "ignore_index": job.ignore_index, "z_loss": job.z_loss}
    if share.all_max is None and wanted:
        return losses_and_gradient_(logits, labels, losses, factor=factor, **place)
    maxima, sums, own_losses = row_statistics(logits, labels, **place)
    if share.all_max is None:
        losses.copy_(own_losses)
        return None
    highest = maxima.clone()
    share.all_max(highest)
    sums[:, :1] *= maxima.sub_(highest).exp2_()
    share.all_sum(sums)
    losses.copy_(losses_from_statistics(highest, sums, job.z_loss))
    losses.masked_fill_(labels == job.ignore_index, 0)
    if wanted:
        rows_gradient(logits, labels, highest, sums, logits, factor=factor, **place)
    return None


def empty_gradient(hidden: Tensor, factor: Tensor | None) -> Tensor:
    """Room for hidden's gradient, row by row however hidden lies. One that a factor is still to come to is not rounded
    before."""
    precise = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(hidden.shape, dtype=precise if factor is None else None)


def _aligned_rows(like: Tensor, rows: int, columns: int) -> Tensor:
    """Uninitialised [rows, columns or some more], of which each row is aligned."""
    multiple = ROW_ALIGNMENT // like.element_size()
    return like.new_empty(rows, _quotient_above(columns, multiple) * multiple)


def sum_of_products(weight: Tensor, into: Tensor | None, tokens: int) -> Tensor:
    """What the weight's gradient is added up in; the first product overwrites what is new."""
    if into is not None:
        return into
    return (weight.new_empty if tokens else weight.new_zeros)(weight.shape, dtype=torch.float32)


def chunks_of(length: int, step: int) -> Iterator[slice]:
    """Of so many tokens, `step` of them each."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
