"""Causal language-model loss.

    loss = 1/n  sum over positions with label y of  ( lse - z_y + c lse^2 )        lse = log sum_v exp z_v

Shapes: logits z [B batch, S sequence, V vocabulary]; labels int64 [B, S], -100 where there is none; returns a scalar in
fp32 (fp64 for fp64 logits). n is `num_items_in_batch` where given (the labels of all micro-batches and ranks that make
one step), else the labels seen here. With no label at all the loss is 0 and so is its gradient, not NaN.
c is the weight of the z-loss, 0 unless given. The kernels are those of `softmax_rows.py`.
Source: transformers' `ForCausalLMLoss`, whose numbers it gives wherever those are finite.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neox_hf.kernels.dispatch import Op
from neox_hf.kernels.once_differentiable import once_differentiable
from neox_hf.kernels.registration import register, register_fake
from neox_hf.kernels.softmax_rows import row_statistics, rows_gradient, sum_of_losses

IGNORE_INDEX = -100


def cross_entropy_reference(logits: Tensor, next_labels: Tensor, ignore_index: int, z_loss: float = 0.0) -> Tensor:
    """Sum of the losses of logits [N, V] against next_labels [N], statistics in fp32."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(precise, next_labels, ignore_index=ignore_index, reduction="sum")
    if z_loss:
        lse = precise.logsumexp(dim=-1).masked_fill(next_labels == ignore_index, 0)
        total = total + z_loss * lse.square().sum()
    return total


@register("cross_entropy_forward")
def cross_entropy_forward(
    logits: Tensor, next_labels: Tensor, ignore_index: int, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses, and the statistics [N, 1] and [N, 3] of `row_statistics`."""
    maxima, sums, losses = row_statistics(
        logits, next_labels, words=logits.shape[1], ignore_index=ignore_index, z_loss=z_loss
    )
    return sum_of_losses(losses), maxima, sums


@register_fake(cross_entropy_forward)
def _(logits: Tensor, next_labels: Tensor, ignore_index: int, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in ((), (rows, 1), (rows, 3)))


@register("cross_entropy_backward")
def cross_entropy_backward(
    logits: Tensor,
    next_labels: Tensor,
    maxima: Tensor,
    sums: Tensor,
    upstream: Tensor,
    ignore_index: int,
    z_loss: float,
) -> Tensor:
    """Gradient [N, V] in the logits: one read, one write."""
    out = logits.new_empty(logits.shape)
    rows_gradient(
        logits,
        next_labels,
        maxima,
        sums,
        out,
        words=logits.shape[1],
        ignore_index=ignore_index,
        z_loss=z_loss,
        factor=upstream,
    )
    return out


@register_fake(cross_entropy_backward)
def _(
    logits: Tensor,
    next_labels: Tensor,
    maxima: Tensor,
    sums: Tensor,
    upstream: Tensor,
    ignore_index: int,
    z_loss: float,
) -> Tensor:
    return logits.new_empty(logits.shape)


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits, which are the caller's, and four numbers a row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, next_labels: Tensor, ignore_index: int, z_loss: float) -> Tensor:
        total, maxima, sums = cross_entropy_forward(logits, next_labels, ignore_index, z_loss)
        ctx.save_for_backward(logits, next_labels, maxima, sums)
        ctx.options = (ignore_index, z_loss)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return cross_entropy_backward(*ctx.saved_tensors, upstream, *ctx.options), None, None, None


def cross_entropy_kernel(logits: Tensor, next_labels: Tensor, ignore_index: int, z_loss: float = 0.0) -> Tensor:
    """`cross_entropy_reference` in Triton. A label that is no word makes the loss NaN, where torch stops."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    return _CrossEntropy.apply(logits, next_labels.contiguous(), ignore_index, z_loss)


CROSS_ENTROPY = Op("cross_entropy", torch=cross_entropy_reference, triton=cross_entropy_kernel)


def cross_entropy(
    logits: Tensor,
    labels: Tensor | None,
    *,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Mean loss of logits [B, S, V], each position's with z_loss times its squared log-sum-exp.

    labels [B, S] are the tokens themselves and are shifted here; shift_labels [B, S] are the next tokens already, and
    win where both are given.

    Raises:
        ValueError: neither kind of labels was given, or they are not one whole number for each position.
    """
    next_labels = labels_of_next_tokens(labels, shift_labels, ignore_index).to(logits.device)
    check_labels(next_labels, logits.shape[:-1])
    next_labels = next_labels.reshape(-1).long()
    rows = logits.reshape(-1, logits.shape[-1])
    total = CROSS_ENTROPY.choose(backend, logits)(rows, next_labels, ignore_index, z_loss)
    return mean_over_labels(total, next_labels, num_items_in_batch, ignore_index)


def labels_of_next_tokens(labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    """The label of each position's next token [B, S].

    Raises:
        ValueError: neither kind of labels was given.
    """
    if shift_labels is not None:
        return shift_labels
    if labels is None:
        raise ValueError("cross_entropy needs labels or shift_labels; found neither")
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def check_labels(labels: Tensor, wanted: torch.Size) -> None:
    """Raises ValueError unless there is one label, a whole number, for each of `wanted` tokens.

    Another shape of as many will do, as for transformers, which flattens both.
    """
    if labels.numel() != wanted.numel() or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"labels are {labels.dtype} {list(labels.shape)}, for tokens {list(wanted)}; give one whole number for each"
        )


def mean_over_labels(
    total: Tensor, next_labels: Tensor, num_items_in_batch: Tensor | int | None, ignore_index: int
) -> Tensor:
    """`total`, a sum of losses, over the `number_of_labels`."""
    return total / number_of_labels(next_labels, num_items_in_batch, ignore_index)


def number_of_labels(next_labels: Tensor, num_items_in_batch: Tensor | int | None, ignore_index: int) -> Tensor | int:
    """Labels of the step where given, else those seen here, as one number; 1 where there is none."""
    if num_items_in_batch is None:
        num_items_in_batch = (next_labels != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        return num_items_in_batch.to(next_labels.device).clamp(min=1)
    return max(num_items_in_batch, 1)
