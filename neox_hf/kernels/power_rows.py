"""What `power_losses.py` does to single rows, beside its products, in Triton. Its docstring has the equations.

All powers are of 2, so logits are counted in units of log2(e): `at_label` is z_y log2(e), `reference` is r.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from neox_hf.kernels.chunked_losses import Job
from neox_hf.kernels.devices import on_device_of
from neox_hf.kernels.language import tl, triton
from neox_hf.kernels.softmax_rows import LN_2, LOG2_E, LOWEST, factor_of, label_column_of

MOST_TOTAL = tl.constexpr(2.0**96)
"""Sums of powers beyond this are made again: products with them could leave the range of fp32."""

WORDS_AGAIN = tl.constexpr(64)
"""Words whose logits are made again at a time."""


@triton.jit
def _word_of(label, first_word, words, ignore_index):
    """Row of the head that is the label's; -1 where it has none, or is ignored."""
    column, held = label_column_of(label, first_word, words)
    return tl.where(held & (label != ignore_index), column, -1).to(tl.int64)


@triton.jit
def _references_kernel(
    hidden, weight, labels, at_label, references, columns, words, first_word, ignore_index, BLOCK: tl.constexpr
):
    token = tl.program_id(0)
    label = tl.load(labels + token)
    word = _word_of(label, first_word, words, ignore_index)
    here = tl.arange(0, BLOCK)
    x = tl.load(hidden + token.to(tl.int64) * columns + here, mask=here < columns, other=0.0).to(tl.float32)
    w = tl.load(weight + word * columns + here, mask=here < tl.where(word >= 0, columns, 0), other=0.0).to(tl.float32)
    logit = tl.sum(x * w, 0) * LOG2_E
    tl.store(at_label + token, logit)
    tl.store(references + token, tl.where(word >= 0, tl.ceil(logit), float("inf")))


@triton.jit
def _logits_again(x_row, weight, columns, start, BLOCK: tl.constexpr):
    """Logits [WORDS_AGAIN] of one token, in units of log2(e)."""
    word = (start + tl.arange(0, WORDS_AGAIN)).to(tl.int64)
    logits = tl.zeros([WORDS_AGAIN], tl.float32)
    for first in range(0, columns, BLOCK):
        here = first + tl.arange(0, BLOCK)
        x = tl.load(x_row + here, mask=here < columns, other=0.0).to(tl.float32)
        w = tl.load(weight + word[:, None] * columns + here[None, :], mask=(here < columns)[None, :], other=0.0)
        logits += tl.sum(w.to(tl.float32) * x[None, :], 1)
    return logits * LOG2_E


@triton.jit
def _powers_again(row, x_row, weight, label_word, columns, words, BLOCK: tl.constexpr):
    """A row's powers over its largest logit, 0 for the label; that logit, and their sum with the label's."""
    highest = tl.full([], LOWEST, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for start in range(0, words, WORDS_AGAIN):
        z = _logits_again(x_row, weight, columns, start, BLOCK)
        higher = tl.maximum(highest, tl.max(z, 0))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(z - higher), 0)
        highest = higher
    for start in range(0, words, WORDS_AGAIN):
        z = _logits_again(x_row, weight, columns, start, BLOCK)
        word = start + tl.arange(0, WORDS_AGAIN)
        power = tl.where(word == label_word, 0.0, tl.exp2(z - highest))
        tl.store(row + word, power.to(row.dtype.element_ty))
    return highest, total


@triton.jit
def _finish_kernel(
    powers,
    sums,
    hidden,
    weight,
    labels,
    at_label,
    references,
    factor,
    losses,
    shares,
    own,
    scaled,
    row_stride,
    parts,
    columns,
    words,
    first_word,
    ignore_index,
    z_loss,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_AGAIN: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row, x_row = powers + token * row_stride, hidden + token * columns
    label = tl.load(labels + token)
    word = _word_of(label, first_word, words, ignore_index)
    logit, reference = tl.load(at_label + token), tl.load(references + token)
    part = tl.arange(0, PARTS)
    total = tl.sum(tl.load(sums + token * parts + part, mask=part < parts, other=0.0), 0)
    if total > MOST_TOTAL:
        reference, total = _powers_again(row, x_row, weight, word, columns, words, BLOCK_AGAIN)
    total = tl.where(word >= 0, total, 1.0)
    reference = tl.where(word >= 0, reference, 0.0)
    rest = tl.log2(total) + (reference - logit)  # both are small where the label is nearly certain
    rest = tl.where(rest < 0.0, 0.0, rest)  # it cannot be, but for rounding
    lse = (reference + tl.log2(total)) * LN_2
    loss = rest * LN_2 + z_loss * lse * lse
    nothing = tl.where(label == ignore_index, 0.0, float("nan"))  # a label that is no word
    tl.store(losses + token, tl.where(word >= 0, loss, nothing))
    if shares is not None:
        times = factor_of(factor)
        excess = 1.0 + 2.0 * z_loss * lse
        share = tl.where(word >= 0, times * excess / total, 0.0)
        tl.store(shares + token, share)
        tl.store(own + token, tl.where(word >= 0, times * (tl.exp2(-rest) * excess - 1.0), 0.0))
        tl.store(row + word, 0.0, mask=word >= 0)
        if scaled is not None:
            here = tl.arange(0, BLOCK)
            x = tl.load(x_row + here, mask=here < columns, other=0.0).to(tl.float32)
            tl.store(scaled + token * columns + here, (x * share).to(scaled.dtype.element_ty), mask=here < columns)


@triton.jit
def _labels_kernel(
    gradient, weight, labels, shares, own, columns, words, first_word, ignore_index, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    word = _word_of(tl.load(labels + token), first_word, words, ignore_index)
    here = tl.arange(0, BLOCK)
    w = tl.load(weight + word * columns + here, mask=here < tl.where(word >= 0, columns, 0), other=0.0).to(tl.float32)
    place = gradient + token * columns + here
    total = tl.load(place, mask=here < columns, other=0.0).to(tl.float32)
    total = total * tl.load(shares + token) + w * tl.load(own + token)
    tl.store(place, total.to(gradient.dtype.element_ty), mask=here < columns)


class PerToken(NamedTuple):
    """Numbers of tokens [N], all but their labels in fp32.

    at_label: z_y log2(e). references: r; inf for a token without a word as its label. losses. shares: a. own: g.
    """

    labels: Tensor
    at_label: Tensor
    references: Tensor
    losses: Tensor
    shares: Tensor
    own: Tensor

    def of(self, part: slice) -> "PerToken":
        return PerToken(*(each[part] for each in self))


def per_token(hidden: Tensor, weight: Tensor, labels: Tensor, job: Job) -> PerToken:
    """Of tokens hidden [N, H] and the head's weight [V, H]: what is known before its product. The rest is room."""
    tokens = PerToken(labels, *(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(5)))
    _for_each_row(_references_kernel, (hidden, weight, labels, tokens.at_label, tokens.references), weight, job)
    return tokens


def finish_rows(
    powers: Tensor,
    sums: Tensor,
    hidden: Tensor,
    weight: Tensor,
    tokens: PerToken,
    scaled: Tensor | None,
    job: Job,
    factor: Tensor | None,
) -> None:
    """From powers [C, V] and their sums, in parts [C, P], the losses of tokens hidden [C, H] and, where gradients are
    wanted, shares and own. scaled [C, H], where given, gets a x. The label's power becomes 0.

    Rows whose sum is too large get another reference, and powers that are made again."""
    (rows, columns), (words, parts) = hidden.shape, (powers.shape[1], sums.shape[1])
    assert words % WORDS_AGAIN.value == 0, f"{words} words are no multiple of {WORDS_AGAIN.value}"
    if rows == 0:
        return
    labels, at_label, references, losses, shares, own = tokens
    gradient = (shares, own, scaled) if any(job.wanted) else (None, None, None)
    tensors = (powers, sums, hidden, weight, labels, at_label, references, factor, losses, *gradient)
    sizes = (powers.stride(0), parts, columns, words, job.share.first_row, job.ignore_index, job.z_loss)
    block = triton.next_power_of_2(columns)
    blocks = {"PARTS": triton.next_power_of_2(parts), "BLOCK": block, "BLOCK_AGAIN": min(block, 64)}
    with on_device_of(powers):
        _finish_kernel[(rows,)](*tensors, *sizes, **blocks, num_warps=4)


def add_labels_(gradient: Tensor, weight: Tensor, tokens: PerToken, job: Job) -> None:
    """gradient [C, H] = a gradient + g weight_y, in place: from E weight, the gradient of hidden."""
    _for_each_row(_labels_kernel, (gradient, weight, tokens.labels, tokens.shares, tokens.own), weight, job)


def _for_each_row(kernel: Any, tensors: tuple[Tensor, ...], weight: Tensor, job: Job) -> None:
    """Launch `kernel`, a program for each row [H] of the first of `tensors`, 8 elements a lane."""
    rows, columns = tensors[0].shape
    block = triton.next_power_of_2(columns)
    sizes = (columns, weight.shape[0], job.share.first_row, job.ignore_index)
    if rows:
        with on_device_of(weight):
            kernel[(rows,)](*tensors, *sizes, BLOCK=block, num_warps=min(max(block // 256, 1), 16))
