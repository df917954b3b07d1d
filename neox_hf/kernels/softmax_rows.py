"""Softmax, loss and gradient of rows of logits, in Triton: for `cross_entropy` and for `linear_cross_entropy`.

The equation is in `vocabulary_share.py`. Logits [C rows, V] in fp32, bf16 or fp16 may have any row stride; the columns
from `words` on are padding: outside the softmax, with gradient 0. A row whose label is `ignore_index` has loss 0 and
gradient 0, and is not read. A label that is no word of these columns makes the row's loss NaN.

- `losses_and_gradient_`: all of it in one launch, the gradient in place of the logits.
- `row_statistics`: the four numbers below and the loss; reads each row once.
- `rows_gradient`: the gradient from statistics that may be those of all ranks; one read and one write.

Each row is read in tiles [GROUPS, VECTOR]: a group is the 16 bytes that one thread loads, and has a running maximum and
sum of its own, so that threads meet only at the end of the row. Powers are of 2, one instruction each where those of e
are six: for logits z, M = max z log2(e) and the sum of 2^(z log2(e) - M), whose product is rounded once, with the
difference. M is where the powers are counted from, so that its own rounding cancels.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neox_hf.kernels.devices import multiprocessors, on_device_of
from neox_hf.kernels.language import tl, triton
from neox_hf.kernels.launch_choice import LaunchChoice

LOWEST = tl.constexpr(-3.0e38)
"""The maximum of no logit: finite, so that differences from it are numbers."""

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

L1_BYTES = 200 * 1024
"""What rows in work may take of a multiprocessor's 256 KB, to be read a second time from there."""

MOST_WARPS = 64
"""Resident warps of one multiprocessor."""


@dataclass(frozen=True)
class Launch:
    """Tile [groups, vector] of a row, warps that share it, and how many programs share a multiprocessor."""

    groups: int
    vector: int
    warps: int
    programs: int

    @property
    def block(self) -> int:
        return self.groups * self.vector


@functools.cache
def launch_for(columns: int, element_size: int) -> Launch:
    """16 bytes a thread and load, two loads at a time, as many rows at once as the first-level cache keeps.

    That is enough in flight: 1024 threads x 32 bytes a multiprocessor, where latency x bandwidth asks for 26 KB.
    """
    vector = 16 // element_size
    cached = max(L1_BYTES // max(columns * element_size, 1), 1)
    most = 2048 if cached == 1 else 1024  # a row alone has all 1024 threads
    groups = min(1 << (max(-(-columns // vector), 1) - 1).bit_length(), most)
    warps = max(groups // 64, 1)
    return Launch(groups, vector, warps, min(cached, MOST_WARPS // warps))


def _launches(columns: int, element_size: int) -> tuple[Launch, ...]:
    """The default, then one load at a time instead of two, another number of rows at once, narrower and wider tiles."""
    launch = launch_for(columns, element_size)
    narrow, wide = replace(launch, groups=launch.groups // 2), replace(launch, groups=launch.groups * 2)
    others = (
        replace(launch, warps=launch.warps * 2),
        replace(launch, programs=launch.programs + 1),
        replace(launch, programs=launch.programs - 1),
        replace(narrow, warps=launch.warps // 2, programs=launch.programs * 2),
        replace(wide, warps=launch.warps * 2),
    )
    return launch, *(each for each in others if each.groups and 1 <= each.warps <= 32 and each.programs)


FUSED = LaunchChoice("losses_and_gradient", _launches)


@triton.jit
def _columns(start, GROUPS: tl.constexpr, VECTOR: tl.constexpr):
    """Columns [GROUPS, VECTOR] of the tile at `start`."""
    return start + tl.arange(0, GROUPS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _words_of(row, here, columns, words):
    """Logits of the last tiles, which hold padding and the row's end; -inf for both."""
    # What is loaded ends at `columns`, a multiple of VECTOR more often than `words` is: then it is loaded in vectors.
    z = tl.load(row + here, mask=here < columns, other=float("-inf")).to(tl.float32)
    return tl.where(here < words, z, float("-inf"))


@triton.jit
def _above(z, maximum):
    """z log2(e) - maximum, rounded once."""
    return tl.fma(z, LOG2_E, -maximum)


@triton.jit
def _absorb(maximum, total, z):
    """Takes logits [GROUPS, VECTOR] into the groups' maxima and sums of powers [GROUPS]."""
    higher = tl.maximum(maximum, tl.max(z, 1) * LOG2_E)
    return higher, total * tl.exp2(maximum - higher) + tl.sum(tl.exp2(_above(z, higher[:, None])), 1)


@triton.jit
def _statistics(row, columns, words, GROUPS: tl.constexpr, VECTOR: tl.constexpr):
    """Maximum and sum of powers of one row; LOWEST and 0 of no words."""
    BLOCK: tl.constexpr = GROUPS * VECTOR
    maximum = tl.full((GROUPS,), LOWEST, tl.float32)
    total = tl.zeros((GROUPS,), tl.float32)
    whole = words // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        z = tl.load(row + _columns(start, GROUPS, VECTOR)).to(tl.float32)
        maximum, total = _absorb(maximum, total, z)
    if whole < words:
        z = _words_of(row, _columns(whole, GROUPS, VECTOR), columns, words)
        maximum, total = _absorb(maximum, total, z)
    highest = tl.max(maximum, 0)
    return highest, tl.sum(total * tl.exp2(maximum - highest), 0)


@triton.jit
def _loss(maximum, total, at_label, held, z_loss):
    lse = (maximum + tl.log2(total)) * LN_2
    return tl.where(held, (tl.log2(total) - _above(at_label, maximum)) * LN_2, float("nan")) + z_loss * lse * lse


@triton.jit
def _share(maximum, total, z_loss, onehot):
    """What a power is times, to be the word's part of the gradient."""
    return onehot * (1.0 + 2.0 * z_loss * LN_2 * (maximum + tl.log2(total))) / total


@triton.jit
def _gradient(z, start, maximum, share, label_column, onehot, GROUPS: tl.constexpr, VECTOR: tl.constexpr):
    """Gradient of the tile at `start`, not rounded yet."""
    gradient = tl.exp2(_above(z, maximum)) * share
    if (label_column >= start) & (label_column < start + GROUPS * VECTOR):
        gradient -= tl.where(_columns(start, GROUPS, VECTOR) == label_column, onehot, 0.0)
    return gradient


@triton.jit
def label_column_of(label, first_word, words):
    """Column of a label among these words, and whether it has one; -1 where it has not."""
    column = label - first_word
    held = (column >= 0) & (column < words)
    return tl.where(held, column, -1).to(tl.int32), held


@triton.jit
def factor_of(factor):
    """What a gradient is to be times: 1, or one number in memory."""
    if factor is None:
        return 1.0
    else:
        return tl.load(factor).to(tl.float32)


@triton.jit
def _fused_kernel(
    logits,
    labels,
    losses,
    factor,
    row_stride,
    rows,
    columns,
    words,
    first_word,
    ignore_index,
    z_loss,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    BLOCK: tl.constexpr = GROUPS * VECTOR
    whole = words // BLOCK * BLOCK
    stride = tl.cast(row_stride, tl.int64)
    onehot = factor_of(factor)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = logits + index * stride
        label = tl.load(labels + index)
        if label == ignore_index:
            tl.store(losses + index, 0.0)
            for start in range(0, columns, BLOCK):
                here = _columns(start, GROUPS, VECTOR)
                nothing = tl.zeros((GROUPS, VECTOR), logits.dtype.element_ty)
                tl.store(row + here, nothing, mask=here < columns)
        else:
            label_column, held = label_column_of(label, first_word, words)
            at_label = tl.load(row + label_column, mask=held, other=0.0).to(tl.float32)
            maximum, total = _statistics(row, columns, words, GROUPS, VECTOR)
            tl.store(losses + index, _loss(maximum, total, at_label, held, z_loss))
            share = _share(maximum, total, z_loss, onehot)
            # Backwards: what was read last is the nearest.
            for start in range(whole, columns, BLOCK):
                here = _columns(start, GROUPS, VECTOR)
                z = _words_of(row, here, columns, words)
                gradient = _gradient(z, start, maximum, share, label_column, onehot, GROUPS, VECTOR)
                gradient = tl.where(here < words, gradient, 0.0)
                tl.store(row + here, gradient.to(logits.dtype.element_ty), mask=here < columns)
            for done in range(0, whole, BLOCK):
                start = whole - BLOCK - done
                here = _columns(start, GROUPS, VECTOR)
                z = tl.load(row + here).to(tl.float32)
                gradient = _gradient(z, start, maximum, share, label_column, onehot, GROUPS, VECTOR)
                tl.store(row + here, gradient.to(logits.dtype.element_ty))


@triton.jit
def _statistics_kernel(
    logits,
    labels,
    maxima,
    sums,
    losses,
    row_stride,
    columns,
    words,
    first_word,
    ignore_index,
    z_loss,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    index = tl.program_id(0)
    row = logits + index * tl.cast(row_stride, tl.int64)
    label = tl.load(labels + index)
    ignored = label == ignore_index
    label_column, held = label_column_of(label, first_word, words)
    at_label = tl.load(row + label_column, mask=held & (label != ignore_index), other=0.0).to(tl.float32)
    # An ignored row reads no word, and stands for one logit of 0.
    maximum, total = _statistics(row, columns, tl.where(ignored, 0, words), GROUPS, VECTOR)
    maximum = tl.where(ignored, 0.0, maximum)
    total = tl.where(ignored, 1.0, total)
    held = held | ignored
    tl.store(maxima + index, maximum)
    tl.store(sums + index * 3, total)
    tl.store(sums + index * 3 + 1, at_label * LOG2_E)
    tl.store(sums + index * 3 + 2, held.to(tl.float32))
    tl.store(losses + index, tl.where(ignored, 0.0, _loss(maximum, total, at_label, held, z_loss)))


@triton.jit
def _gradient_kernel(
    logits,
    gradients,
    labels,
    maxima,
    sums,
    factor,
    row_stride,
    gradient_stride,
    columns,
    words,
    first_word,
    ignore_index,
    z_loss,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    tiles = tl.cdiv(columns, GROUPS * VECTOR)
    index = tl.program_id(0) // tiles
    start = tl.program_id(0) % tiles * (GROUPS * VECTOR)
    here = _columns(start, GROUPS, VECTOR)
    row = logits + index * tl.cast(row_stride, tl.int64)
    z = _words_of(row, here, columns, words)  # waits for no label
    label = tl.load(labels + index)
    label_column, _ = label_column_of(label, first_word, words)
    maximum = tl.load(maxima + index)
    total = tl.load(sums + index * 3)
    onehot = factor_of(factor)
    share = _share(maximum, total, z_loss, onehot)
    gradient = _gradient(z, start, maximum, share, label_column, onehot, GROUPS, VECTOR)
    gradient = tl.where(here < tl.where(label == ignore_index, 0, words), gradient, 0.0)
    out = gradients + index * tl.cast(gradient_stride, tl.int64)
    tl.store(out + here, gradient.to(gradients.dtype.element_ty), mask=here < columns)


def losses_and_gradient_(
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    *,
    words: int,
    first_word: int = 0,
    ignore_index: int,
    z_loss: float = 0.0,
    factor: Tensor | None = None,
    launch: Launch | None = None,
) -> None:
    """Writes losses fp32 [C], and over the logits [C, V] their gradient, times `factor` (one number) where given."""
    rows, columns = _checked(logits, labels)
    if rows == 0:
        return
    launch = launch or FUSED.chosen(logits.device, logits.dtype, columns, logits.element_size())
    with on_device_of(logits):
        _fused_kernel[(min(rows, multiprocessors(logits.device) * launch.programs),)](
            logits,
            labels,
            losses,
            factor,
            logits.stride(0),
            rows,
            columns,
            words,
            first_word,
            ignore_index,
            z_loss,
            GROUPS=launch.groups,
            VECTOR=launch.vector,
            num_warps=launch.warps,
        )


def row_statistics(
    logits: Tensor,
    labels: Tensor,
    *,
    words: int,
    first_word: int = 0,
    ignore_index: int,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of these columns alone, in fp32: maxima M [C, 1]; sums [C, 3] of the powers above M, of the label's logit times
    log2(e) where it is here, and whether it is; losses [C]. An ignored row counts as one logit of 0, the label's."""
    rows, columns = _checked(logits, labels)
    maxima, sums, losses = (logits.new_empty(shape, dtype=torch.float32) for shape in ((rows, 1), (rows, 3), (rows,)))
    if rows:
        launch = launch_for(columns, logits.element_size())
        with on_device_of(logits):
            _statistics_kernel[(rows,)](
                logits,
                labels,
                maxima,
                sums,
                losses,
                logits.stride(0),
                columns,
                words,
                first_word,
                ignore_index,
                z_loss,
                GROUPS=launch.groups,
                VECTOR=launch.vector,
                num_warps=launch.warps,
            )
    return maxima, sums, losses


def sum_of_losses(losses: Tensor) -> Tensor:
    """Of losses fp32 [C], rounded once: thousands of them added in fp32 are off by a last bit or two."""
    return losses.sum(dtype=torch.float64).to(losses.dtype)


def losses_from_statistics(maxima: Tensor, sums: Tensor, z_loss: float) -> Tensor:
    """Losses [C] from what `row_statistics` gives, of one rank or, reduced, of all. NaN for a label nobody holds."""
    total, at_label, holders = sums.unbind(dim=1)
    lse = (maxima.squeeze(1) + total.log2()) * math.log(2)
    losses = (maxima.squeeze(1) - at_label + total.log2()) * math.log(2)
    return (losses + z_loss * lse.square()).where(holders > 0, math.nan)


def rows_gradient(
    logits: Tensor,
    labels: Tensor,
    maxima: Tensor,
    sums: Tensor,
    out: Tensor,
    *,
    words: int,
    first_word: int = 0,
    ignore_index: int,
    z_loss: float = 0.0,
    factor: Tensor | None = None,
) -> None:
    """Gradient of the losses, times `factor` where given, into `out` [C, V], which may be the logits themselves.

    maxima and sums: as `row_statistics` gives them, of these columns or, reduced, of all ranks'."""
    rows, columns = _checked(logits, labels)
    if rows == 0:
        return
    launch = launch_for(columns, logits.element_size())
    groups = min(launch.groups, 512)  # a program has one tile: many small ones keep the memory busier
    with on_device_of(logits):
        _gradient_kernel[(rows * -(-columns // (groups * launch.vector)),)](
            logits,
            out,
            labels,
            maxima,
            sums,
            factor,
            logits.stride(0),
            out.stride(0),
            columns,
            words,
            first_word,
            ignore_index,
            z_loss,
            GROUPS=groups,
            VECTOR=launch.vector,
            num_warps=max(groups // 64, 1),
        )


def _checked(logits: Tensor, labels: Tensor) -> tuple[int, int]:
    """Rows and columns of logits that a kernel can read."""
    assert logits.ndim == 2, f"logits {tuple(logits.shape)} have rows and columns"
    assert logits.stride(1) == 1 or logits.shape[1] == 1, "a row of logits is contiguous"
    assert labels.shape == logits.shape[:1], f"labels {tuple(labels.shape)} for logits {tuple(logits.shape)}"
    assert labels.is_contiguous(), "labels are read one after the other"
    return logits.shape[0], logits.shape[1]
