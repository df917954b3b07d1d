"""The language-model head and its loss in one op: no tensor of all tokens times all words ever exists.

    z = hidden weight^T
    loss = sum over tokens with label y of  ( lse - z_y + c lse^2 )        lse = log sum_v exp z_v

Shapes: hidden [N tokens, H]; weight [V, H], this rank's rows of the head; labels int64 [N]; returns a scalar in fp32
(fp64 for fp64). The same loss as `cross_entropy` of the logits z, where N is B x S; c is the weight of the z-loss.

Tokens are taken chunk by chunk, which gives the loss and both gradients at once: by three products and a pass over the
logits (`chunked_losses.py`), or by products alone (`power_losses.py`). What the backward pass has to multiply them by
is mostly known beforehand, and in them already (`expected_factor.py`). Where the vocabulary is split over ranks, two
small reductions a chunk join their softmaxes (`vocabulary_share.py`).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from neox_hf.kernels.autocast import autocast_dtype, without_autocast
from neox_hf.kernels.chunked_losses import (
    KERNEL_BYTES_AT_ONCE,
    LOGITS_AT_ONCE,
    Job,
    Result,
    chunked_losses,
    default_chunk,
    empty_gradient,
    scaled,
)
from neox_hf.kernels.cross_entropy import IGNORE_INDEX, check_labels
from neox_hf.kernels.dispatch import Op
from neox_hf.kernels.expected_factor import put_right_, quotient
from neox_hf.kernels.gradient_dtype import gradient_dtype
from neox_hf.kernels.once_differentiable import once_differentiable
from neox_hf.kernels.power_losses import kernel_losses
from neox_hf.kernels.registration import register, register_fake
from neox_hf.kernels.vocabulary_share import Reduce, VocabularyShare

PROMISE_TOLERANCE = 1e-3
"""Relative difference of two ways to compute one factor; a number of labels counted otherwise differs by more."""


# An op of its own, so that a compiler does not unroll the chunks. It can call no ranks: they stay Python's.
@register("linear_cross_entropy", mutates=("into",))
def linear_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    factor: Tensor | None,
    into: Tensor | None,
    ignore_index: int,
    first_row: int,
    rows: int,
    chunk: int,
    z_loss: float,
    wants_hidden: bool,
    wants_weight: bool,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`Result` of a whole vocabulary, with an empty tensor for a gradient that is not wanted or that `into` has."""
    job = Job(ignore_index, VocabularyShare(first_row, rows), chunk, z_loss, (wants_hidden, wants_weight))
    losses = kernel_losses if kernel else chunked_losses
    with without_autocast(hidden.device):
        total, for_hidden, for_weight = losses(hidden, weight, labels, factor, into, job)
    nothing = hidden.new_empty
    return (
        total,
        nothing(0) if for_hidden is None else for_hidden,
        nothing(0) if for_weight is None or into is not None else for_weight,
    )


@register_fake(linear_cross_entropy_op)
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    factor: Tensor | None,
    into: Tensor | None,
    ignore_index: int,
    first_row: int,
    rows: int,
    chunk: int,
    z_loss: float,
    wants_hidden: bool,
    wants_weight: bool,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    precise = torch.promote_types(weight.dtype, torch.float32)
    nothing = hidden.new_empty
    return (
        nothing((), dtype=precise),
        empty_gradient(hidden, factor) if wants_hidden else nothing(0),
        nothing(weight.shape, dtype=precise) if wants_weight and into is None else nothing(0),
    )


def _computed(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    factor: Tensor | None,
    into: Tensor | None,
    job: Job,
    kernel: bool,
) -> Result:
    """`Result` by the op or, where ranks are to be called, by what it calls."""
    share, wanted = job.share, job.wanted
    if share.all_max is not None:
        losses = kernel_losses if kernel else chunked_losses
        with without_autocast(hidden.device):
            return losses(hidden, weight, labels, factor, into, job)
    whole = (job.ignore_index, share.first_row, share.rows, job.chunk, job.z_loss, *wanted, kernel)
    total, for_hidden, for_weight = linear_cross_entropy_op(hidden, weight, labels, factor, into, *whole)
    return total, for_hidden if wanted[0] else None, for_weight if wanted[1] else None


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward pass, and kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        factor: Tensor | None,
        into: Tensor | None,
        job: Job,
        kernel: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        job = job._replace(wanted=tuple(ctx.needs_input_grad[:2]))
        operands = (hidden.detach().to(dtype), weight.detach().to(dtype))
        total, for_hidden, for_weight = _computed(*operands, labels, factor, into, job, kernel)
        ctx.dtypes, ctx.backend = (hidden.dtype, gradient_dtype(weight)), "triton" if kernel else "torch"
        ctx.promised, ctx.is_used = into is not None, False
        if ctx.promised:
            for_weight = None
        if factor is not None:  # as good as final, so what is kept has its last dtype
            for_hidden, for_weight = (
                None if gradient is None else gradient.to(wanted)
                for gradient, wanted in zip((for_hidden, for_weight), ctx.dtypes, strict=True)
            )
        ctx.save_for_backward(for_hidden, for_weight, factor)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, factor = ctx.saved_tensors
        if ctx.promised:
            kept = (upstream - factor).abs() <= PROMISE_TOLERANCE * factor.abs()
            torch._assert_async(kept, "linear_cross_entropy: backward brings another gradient than upstream= promised")
        elif factor is None or ctx.is_used or torch.compiler.is_compiling():
            ratio = upstream if factor is None else quotient(upstream, factor)
            gradients = [
                None if gradient is None else scaled(gradient, ratio, dtype)
                for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
            ]
        else:
            _put_right(gradients, upstream, factor, ctx.backend)
            ctx.is_used = True  # a second pass must leave alone what this one has handed out
        return (*gradients, None, None, None, None, None, None)


def _put_right(gradients: list[Tensor | None], upstream: Tensor, factor: Tensor, backend: str) -> None:
    """Change the kept gradients and the factor that is in them, unknown to autograd, which would let no pass follow."""
    for gradient in gradients:
        if gradient is not None:
            put_right_(gradient.data, upstream, factor, backend=backend)
    factor.data.copy_(upstream)


def _differentiable(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    factor: Tensor | None,
    into: Tensor | None,
    job: Job,
    kernel: bool,
) -> Tensor:
    """Sum of the losses. Products run in the weight's dtype, or autocast's."""
    dtype = autocast_dtype(hidden.device) or weight.dtype
    if job.chunk is None:
        logits_at_once = KERNEL_BYTES_AT_ONCE // dtype.itemsize if kernel else LOGITS_AT_ONCE
        job = job._replace(chunk=default_chunk(hidden.shape[0], weight.shape[0], logits_at_once))
    if into is None and dtype == torch.float16:
        factor = None  # 1 over some thousand labels would leave its range, where no loss scaling has widened it
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, labels, factor, into, job, kernel, dtype)
    return _computed(hidden.to(dtype), weight.to(dtype), labels, None, None, job, kernel)[0]


LINEAR_CROSS_ENTROPY = Op(
    "linear_cross_entropy", torch=partial(_differentiable, kernel=False), triton=partial(_differentiable, kernel=True)
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
    first_row: int = 0,
    rows: int | None = None,
    chunk: int | None = None,
    all_max: Reduce | None = None,
    all_sum: Reduce | None = None,
    upstream: Tensor | float | None = None,
    accumulate_into: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sum over tokens of the loss of hidden [N, H] through the head weight [V, H].

    labels [N], in any shape, count words of the whole vocabulary; `ignore_index` counts for nothing. z_loss: weight of
    the squared log-sum-exp in each token's loss. weight holds the words from `first_row` on; after `rows` of them (all,
    if not given) come rows of padding, which no probability or gradient reaches. chunk: tokens at a time.
    all_max and all_sum reduce a tensor in place over the ranks that share the vocabulary; each is called once a chunk
    on every rank, which all give the same hidden, labels and chunk. Every rank gets the same sum, and hidden's gradient
    through its own rows only: the gradients of all ranks add up to the whole.

    A weight in half precision gets its gradient rounded once, at the end, or not at all where `weight.grad_dtype` is
    fp32 (a leaf only: an operation between the parameter and this op rounds to the parameter's dtype).
    A label that no rank holds makes the loss NaN.

    upstream: the gradient that backward is expected to bring to this sum, one number, such as 1 over the labels of the
    step where the loss is divided by them. The gradients then hold it at once, and backward costs nothing. Where it
    brings another one they are put right in place, in half precision with one more rounding (none, where the two differ
    by a power of two, as most factors of a loss do). In fp16 it is not used.
    accumulate_into: fp32 [V, H], to which the weight's gradient is added *here*, in the forward pass, wherever one is
    wanted; autograd then brings the weight none. It makes a promise of `upstream`: another one stops the run (on CUDA
    by a device-side assertion).

    Raises:
        ValueError: a chunk of no token, a weight of no word, one of the reductions without the other, labels that are
            not one whole number for each token, or an `accumulate_into` that does not fit.
    """
    check_labels(labels, hidden.shape[:1])
    if (all_max is None) != (all_sum is None):
        given, missing = ("all_max", "all_sum") if all_sum is None else ("all_sum", "all_max")
        raise ValueError(f"linear_cross_entropy was given {given} without {missing}; a split vocabulary needs both")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: a chunk has at least one token")
    if weight.shape[0] == 0:
        raise ValueError(f"a head of weight {list(weight.shape)} has no word to give a probability to")
    if accumulate_into is not None:
        _check_buffer(accumulate_into, weight, upstream)
    share = VocabularyShare(first_row, weight.shape[0] if rows is None else rows, all_max, all_sum)
    job = Job(ignore_index, share, chunk, z_loss)
    implementation = LINEAR_CROSS_ENTROPY.choose(backend, weight)
    if all_max is not None:
        implementation = torch.compiler.disable(implementation)  # a graph would be split at each reduction
    labels = labels.to(hidden.device, torch.int64).reshape(-1).contiguous()
    return implementation(hidden, weight, labels, _as_factor(upstream, weight), accumulate_into, job)


def _as_factor(upstream: Tensor | float | None, weight: Tensor) -> Tensor | None:
    """One number on the weight's device, in the precision of the loss. Python's takes no copy from the host."""
    precise = torch.promote_types(weight.dtype, torch.float32)
    if upstream is None or isinstance(upstream, Tensor):
        return upstream if upstream is None else upstream.detach().to(weight.device, precise, copy=True).reshape(())
    return torch.full((), upstream, dtype=precise, device=weight.device)


def _check_buffer(buffer: Tensor, weight: Tensor, upstream: Tensor | float | None) -> None:
    if upstream is None:
        raise ValueError(
            "accumulate_into was given without upstream; the gradient is added in the forward pass, so give "
            "linear_cross_entropy the factor that backward will bring"
        )
    wanted = (torch.promote_types(weight.dtype, torch.float32), weight.shape, weight.device)
    if (buffer.dtype, buffer.shape, buffer.device) != wanted or not buffer.is_contiguous():
        raise ValueError(
            f"accumulate_into is {buffer.dtype} {list(buffer.shape)} on {buffer.device}, strides "
            f"{list(buffer.stride())}; the gradient of this weight wants a contiguous {wanted[0]} "
            f"{list(wanted[1])} on {wanted[2]}"
        )
