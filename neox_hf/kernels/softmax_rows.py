"""Softmax, loss and gradient of rows of logits, in Triton: for `cross_entropy` and for `linear_cross_entropy`.

The equation is in `vocabulary_share.py`. Logits [C rows, V] in fp32, bf16 or fp16 may have any row stride; the columns
from `words` on are padding: outside the softmax, with gradient 0. A row whose label is `ignore_index` has loss 0 and
gradient 0, and is not read. A label that is no word of these columns makes the row's loss NaN.

- `losses_and_gradient_`: all of it in one launch, the gradient in place of the logits.
- `row_statistics`: maximum, sum of exponentials, label's logit, loss; reads each row once.
- `rows_gradient`: the gradient from statistics that may be those of all ranks; one read and one write.

Each row is read in tiles [GROUPS, VECTOR]: a group is the 16 bytes that one thread loads, and has a running maximum and
sum of its own, so that threads meet only at the end of the row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from neox_hf.kernels.language import tl, triton

LOWEST = tl.constexpr(-3.0e38)
"""The maximum of no logit: finite, so that differences from it are numbers."""

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


def launch_for(columns: int, element_size: int) -> Launch:
    """16 bytes a thread and load, two loads at a time, as many rows at once as the first-level cache keeps.

    That is enough in flight: 1024 threads x 32 bytes a multiprocessor, where latency x bandwidth asks for 26 KB.
    """
    vector = 16 // element_size
    cached = max(L1_BYTES // max(columns * element_size, 1), 1)
    most = 2048 if cached == 1 else 1024  # a row alone has all 1024 threads
    groups = min(triton.next_power_of_2(max(triton.cdiv(columns, vector), 1)), most)
    warps = max(groups // 64, 1)
    return Launch(groups, vector, warps, min(cached, MOST_WARPS // warps))


@triton.jit
def _columns(start, GROUPS: tl.constexpr, VECTOR: tl.constexpr):
    """Columns [GROUPS, VECTOR] of the tile at `start`."""
    return start + tl.arange(0, GROUPS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _absorb(highest, total, z):
    """Takes logits [GROUPS, VECTOR] into the groups' maxima and sums of exponentials [GROUPS]."""
    above = tl.maximum(highest, tl.max(z, 1))
    return above, total * tl.exp(highest - above) + tl.sum(tl.exp(z - above[:, None]), 1)


@triton.jit
def _statistics(row, words, GROUPS: tl.constexpr, VECTOR: tl.constexpr):
    """Maximum and sum of exponentials above it of one row; LOWEST and 0 of no words."""
    BLOCK: tl.constexpr = GROUPS * VECTOR
    highest = tl.full((GROUPS,), LOWEST, tl.float32)
    total = tl.zeros((GROUPS,), tl.float32)
    whole = words // BLOCK * BLOCK
    # Whole tiles have no mask, so that odd numbers of words spoil vector loads in the last tile alone.
    for start in range(0, whole, BLOCK):
        z = tl.load(row + _columns(start, GROUPS, VECTOR)).to(tl.float32)
        highest, total = _absorb(highest, total, z)
    if whole < words:
        columns = _columns(whole, GROUPS, VECTOR)
        z = tl.load(row + columns, mask=columns < words, other=float("-inf")).to(tl.float32)
        highest, total = _absorb(highest, total, z)
    peak = tl.max(highest, 0)
    return peak, tl.sum(total * tl.exp(highest - peak), 0)


@triton.jit
def _loss(peak, total, at_label, held, z_loss):
    lse = peak + tl.log(total)
    return tl.where(held, tl.log(total) + (peak - at_label), float("nan")) + z_loss * lse * lse


@triton.jit
def _gradient(z, columns, label_column, peak, share, onehot):
    return tl.exp(z - peak) * share - tl.where(columns == label_column, onehot, 0.0)


@triton.jit
def _label_column(label, first_word, words):
    """Column of a label among these words, and whether it has one; -1 where it has not."""
    column = label - first_word
    held = (column >= 0) & (column < words)
    return tl.where(held, column, -1).to(tl.int32), held


@triton.jit
def _factor(factor):
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
    onehot = _factor(factor)
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
            label_column, held = _label_column(label, first_word, words)
            at_label = tl.load(row + label_column, mask=held, other=0.0).to(tl.float32)
            peak, total = _statistics(row, words, GROUPS, VECTOR)
            tl.store(losses + index, _loss(peak, total, at_label, held, z_loss))
            share = onehot * (1.0 + 2.0 * z_loss * (peak + tl.log(total))) / total
            # Backwards: what was read last is the nearest.
            for start in range(whole, columns, BLOCK):
                here = _columns(start, GROUPS, VECTOR)
                z = tl.load(row + here, mask=here < words, other=float("-inf")).to(tl.float32)
                gradient = _gradient(z, here, label_column, peak, share, onehot)
                gradient = tl.where(here < words, gradient, 0.0)
                tl.store(row + here, gradient.to(logits.dtype.element_ty), mask=here < columns)
            for done in range(0, whole, BLOCK):
                here = _columns(whole - BLOCK - done, GROUPS, VECTOR)
                z = tl.load(row + here).to(tl.float32)
                gradient = _gradient(z, here, label_column, peak, share, onehot)
                tl.store(row + here, gradient.to(logits.dtype.element_ty))


@triton.jit
def _statistics_kernel(
    logits,
    labels,
    peaks,
    sums,
    losses,
    row_stride,
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
    label_column, held = _label_column(label, first_word, words)
    at_label = tl.load(row + label_column, mask=held & (label != ignore_index), other=0.0).to(tl.float32)
    # An ignored row reads no word, and stands for one logit of 0.
    peak, total = _statistics(row, tl.where(ignored, 0, words), GROUPS, VECTOR)
    peak = tl.where(ignored, 0.0, peak)
    total = tl.where(ignored, 1.0, total)
    held = held | ignored
    tl.store(peaks + index, peak)
    tl.store(sums + index * 3, total)
    tl.store(sums + index * 3 + 1, at_label)
    tl.store(sums + index * 3 + 2, held.to(tl.float32))
    tl.store(losses + index, tl.where(ignored, 0.0, _loss(peak, total, at_label, held, z_loss)))


@triton.jit
def _gradient_kernel(
    logits,
    gradients,
    labels,
    peaks,
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
    here = _columns(tl.program_id(0) % tiles * (GROUPS * VECTOR), GROUPS, VECTOR)
    row = logits + index * tl.cast(row_stride, tl.int64)
    z = tl.load(row + here, mask=here < words, other=float("-inf")).to(tl.float32)  # waits for no label
    label = tl.load(labels + index)
    label_column, _ = _label_column(label, first_word, words)
    peak = tl.load(peaks + index)
    total = tl.load(sums + index * 3)
    onehot = _factor(factor)
    share = onehot * (1.0 + 2.0 * z_loss * (peak + tl.log(total))) / total
    gradient = _gradient(z, here, label_column, peak, share, onehot)
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
    launch = launch or launch_for(columns, logits.element_size())
    with torch.cuda.device_of(logits):
        _fused_kernel[(min(rows, _processors(logits) * launch.programs),)](
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
    """Of these columns alone, in fp32: maxima M [C, 1]; sums [C, 3] of exp(z - M), of the label's logit where it is
    here, and whether it is; losses [C]. An ignored row counts as one logit of 0, which is the label's."""
    rows, columns = _checked(logits, labels)
    peaks, sums, losses = (logits.new_empty(shape, dtype=torch.float32) for shape in ((rows, 1), (rows, 3), (rows,)))
    if rows:
        launch = launch_for(columns, logits.element_size())
        with torch.cuda.device_of(logits):
            _statistics_kernel[(rows,)](
                logits,
                labels,
                peaks,
                sums,
                losses,
                logits.stride(0),
                words,
                first_word,
                ignore_index,
                z_loss,
                GROUPS=launch.groups,
                VECTOR=launch.vector,
                num_warps=launch.warps,
            )
    return peaks, sums, losses


def rows_gradient(
    logits: Tensor,
    labels: Tensor,
    peaks: Tensor,
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

    peaks and sums: as `row_statistics` gives them, of these columns or, reduced, of all ranks'."""
    rows, columns = _checked(logits, labels)
    if rows == 0:
        return
    launch = launch_for(columns, logits.element_size())
    groups = min(launch.groups, 512)  # a program has one tile: many small ones keep the memory busier
    with torch.cuda.device_of(logits):
        _gradient_kernel[(rows * triton.cdiv(columns, groups * launch.vector),)](
            logits,
            out,
            labels,
            peaks,
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


def _processors(x: Tensor) -> int:
    """Multiprocessors of the device; one for the interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
