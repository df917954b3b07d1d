"""Row linears that leave their region together and hide the message behind their own products.

    y = x + all-reduce(x1 W1^T + x2 W2^T) + b1 + b2

computed for most of the tokens and then for the rest: while the first sum travels, the products of the rest are
computed, and while the second does, the first is added to the stream. The products add where their sum is to lie, and
no pass of its own does. Of two summands that a rank has got (`exchange.py`), what adds them to the stream reads both.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neox_hf.kernels.bias_dropout_residual import bias_gradients, fill_residual_
from neox_hf.kernels.gradient_dtype import gradient_dtype
from neox_hf.kernels.late_tensor import LateTensor, late_form
from neox_hf.kernels.product import linear_product, product_
from neox_hf.kernels.weight_gradient import AddProduct, adder_of
from neox_hf.parallel.messages import start_all_reduce
from neox_hf.parallel.operands import in_autocast_dtype, weight_gradients
from neox_hf.parallel.tensor_region import TensorRegion

LAST_PART = 4
"""What the last part of the tokens is one of. Measured for Pythia-6.9B: docs/measurements/layouts_h200_x2.md."""

LEAST_TOKENS = 1024
"""Of the last part: the product of so many still fills a GPU."""


class _Branch(NamedTuple):
    """What the backward pass of one linear has to know, besides its operands."""

    add: AddProduct | None
    late: LateTensor | None
    backend: str


class _RoomForStream(torch.autograd.Function):
    """Room for the stream as the linears leave it, which is filled later, and the gradients of all that goes in.

    It is not filled here because this is where checkpointing ends what it computes again: nothing that the backward
    pass needs comes after, and neither products nor messages are to be repeated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        branches: tuple[_Branch, _Branch],
        stream: Tensor,
        bias1: Tensor | None,
        bias2: Tensor | None,
        *operands: Tensor,
    ) -> Tensor:
        inputs, weights = operands[::2], operands[1::2]
        kept = (None if branch.late else x for branch, x in zip(branches, inputs, strict=True))
        ctx.save_for_backward(*kept, *weights)
        ctx.branches, ctx.dtype = branches, inputs[0].dtype
        ctx.bias_dtypes = [
            gradient_dtype(bias) if wanted else None
            for bias, wanted in zip((bias1, bias2), ctx.needs_input_grad[2:4], strict=True)
        ]
        dtype = torch.promote_types(stream.dtype, ctx.dtype)
        return torch.empty_like(stream, dtype=dtype, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved, gradients = ctx.saved_tensors, []
        inputs, weights = saved[: len(ctx.branches)], saved[len(ctx.branches) :]
        _, wants_stream, _, _, *wanted = ctx.needs_input_grad
        for_biases = bias_gradients(gradient, *ctx.bias_dtypes, backend=ctx.branches[0].backend)
        upstream = gradient.to(ctx.dtype)
        for index, (x, weight, (add, late, backend)) in enumerate(zip(inputs, weights, ctx.branches, strict=True)):
            wants_x, wants_weight = wanted[2 * index : 2 * index + 2]
            gradients.append(linear_product(upstream, weight.t(), backend=backend) if wants_x else None)
            if late is None:
                gradients.append(weight_gradients(add, upstream, x, (wants_weight, False), backend)[0])
            else:
                late.when_there(lambda again, add=add: add(upstream.flatten(0, -2), again.flatten(0, -2)))
                gradients.append(None)
        return None, gradient if wants_stream else None, *for_biases, *gradients


@torch.compiler.disable  # messages are none of a compiler's business
def leave_by_parts(
    region: TensorRegion, stream: Tensor, first: tuple[Tensor, nn.Linear], second: tuple[Tensor, nn.Linear]
) -> Tensor:
    """stream [B, S, out], the same on every rank, + the sum over the group of both branches' products + their biases:
    this rank's x [B, S, in / size], and the row linear that is to read it."""
    found, operands = [], []
    for x, linear in (first, second):
        add = adder_of(linear.weight, linear.kernels) if x.requires_grad else None
        found.append(_Branch(add, late_form(x) if add else None, linear.kernels))
        operands += in_autocast_dtype(x, linear.weight.detach() if add else linear.weight)
    biases = first[1].bias, second[1].bias
    joined = _RoomForStream.apply(tuple(found), stream, *biases, *operands)
    with torch.no_grad():
        _fill(joined.detach(), stream, biases, operands, region, found[0].backend)
    return joined


def _fill(
    joined: Tensor,
    stream: Tensor,
    biases: tuple[Tensor | None, Tensor | None],
    operands: list[Tensor],
    region: TensorRegion,
    backend: str,
) -> None:
    joined, stream, x1, x2 = (tensor.flatten(0, -2) for tensor in (joined, stream, *operands[::2]))
    weight1, weight2 = (weight.t() for weight in operands[1::2])
    total = torch.empty_like(joined, dtype=x1.dtype)
    messages = []
    for part in _parts(total.shape[0], travels_beside=region.exchange is not None and region.exchange.copies):
        product_(total[part], x1[part], weight1, backend=backend)
        product_(total[part], x2[part], weight2, keep=True, backend=backend)
        messages.append((part, start_all_reduce(total[part], region)))
    for part, message in messages:

        def add(first: Tensor, second: Tensor | None = None, part: slice = part) -> None:
            fill_residual_(joined[part], stream[part], first, second, biases, backend=backend)

        message.hand_to(add)


def _parts(tokens: int, travels_beside: bool) -> list[slice]:
    """Of the tokens; the last is small, as nothing hides its message. All at once where messages take multiprocessors
    from the products that are to hide them."""
    last = tokens // LAST_PART
    if not travels_beside or last < LEAST_TOKENS:
        return [slice(0, tokens)]
    return [slice(0, tokens - last), slice(tokens - last, tokens)]
