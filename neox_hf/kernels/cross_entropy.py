"""Causal language-model loss.

    loss = 1/n  sum over positions with label y of  ( log sum_v exp z_v  -  z_y )

Shapes: logits z [B batch, S sequence, V vocabulary]; labels int64 [B, S], -100 where there is none; returns a scalar in
fp32 (fp64 for fp64 logits). n is `num_items_in_batch` where given (the labels of all micro-batches and ranks that make
one step), else the labels seen here. With no label at all the loss is 0 and so is its gradient, not NaN.
Source: transformers' `ForCausalLMLoss`, whose numbers it gives wherever those are finite.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from neox_hf.kernels.dispatch import Op

IGNORE_INDEX = -100


def cross_entropy_reference(logits: Tensor, next_labels: Tensor, ignore_index: int) -> Tensor:
    """Sum of the losses of logits [N, V] against next_labels [N], statistics in fp32."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(precise, next_labels, ignore_index=ignore_index, reduction="sum")


CROSS_ENTROPY = Op("cross_entropy", torch=cross_entropy_reference)


def cross_entropy(
    logits: Tensor,
    labels: Tensor | None,
    *,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    backend: str = "auto",
) -> Tensor:
    """Mean loss of logits [B, S, V].

    labels [B, S] are the tokens themselves and are shifted here; shift_labels [B, S] are the next tokens already, and
    win where both are given.

    Raises:
        ValueError: neither kind of labels was given.
    """
    next_labels = labels_of_next_tokens(labels, shift_labels, ignore_index).to(logits.device).reshape(-1)
    total = CROSS_ENTROPY.choose(backend, logits)(logits.reshape(-1, logits.shape[-1]), next_labels, ignore_index)
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


def mean_over_labels(
    total: Tensor, next_labels: Tensor, num_items_in_batch: Tensor | int | None, ignore_index: int
) -> Tensor:
    """`total`, a sum of losses, over the number of labels: those of the step where given, else those seen here."""
    if num_items_in_batch is None:
        num_items_in_batch = (next_labels != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        return total / num_items_in_batch.to(total.device).clamp(min=1)
    return total / max(num_items_in_batch, 1)
