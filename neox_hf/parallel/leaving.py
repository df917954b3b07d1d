"""Row linears that leave their region together, and hide the message behind their own products.

    y = all-reduce(x1 W1^T + x2 W2^T + ...)

computed for some of the tokens at a time: while their sum travels, the products of the next are computed, so that only
the last message is waited for. The products add where their sum is to lie, and no pass of its own does. Biases, which
belong in the sum once, are left to the caller.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neox_hf.kernels.late_tensor import LateTensor, late_form
from neox_hf.kernels.product import linear_product, product_
from neox_hf.kernels.weight_gradient import AddProduct, adder_of
from neox_hf.parallel.messages import start_all_reduce
from neox_hf.parallel.operands import in_autocast_dtype, weight_gradients
from neox_hf.parallel.tensor_region import TensorRegion

MOST_PARTS = 4
PART_TOKENS = 2048
"""Fewest tokens of a part: the product of so many still fills a GPU, and a message of theirs its links."""


class _Branch(NamedTuple):
    """What the backward pass of one linear has to know, besides its operands."""

    add: AddProduct | None
    late: LateTensor | None
    backend: str


class _RoomForSum(torch.autograd.Function):
    """Room for what the linears add up to, which is filled later, and the gradients of all their operands.

    It is not filled here because this is where checkpointing ends what it computes again: nothing that the backward
    pass needs comes after, and neither products nor messages are to be repeated.
    """

    @staticmethod
    def forward(ctx: Any, branches: tuple[_Branch, ...], *operands: Tensor) -> Tensor:
        ctx.branches = branches
        inputs, weights = operands[::2], operands[1::2]
        kept = (None if branch.late else x for branch, x in zip(branches, inputs, strict=True))
        ctx.save_for_backward(*kept, *weights)
        first = inputs[0]
        return first.new_empty(*first.shape[:-1], weights[0].shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved, gradients = ctx.saved_tensors, []
        inputs, weights = saved[: len(ctx.branches)], saved[len(ctx.branches) :]
        for index, (x, weight, (add, late, backend)) in enumerate(zip(inputs, weights, ctx.branches, strict=True)):
            wants_x, wants_weight = ctx.needs_input_grad[1 + 2 * index : 3 + 2 * index]
            gradients.append(linear_product(gradient, weight.t(), backend=backend) if wants_x else None)
            if late is None:
                gradients.append(weight_gradients(add, gradient, x, (wants_weight, False), backend)[0])
            else:
                late.when_there(lambda again, add=add: add(gradient.flatten(0, -2), again.flatten(0, -2)))
                gradients.append(None)
        return None, *gradients


@torch.compiler.disable  # messages are none of a compiler's business
def leave_by_parts(region: TensorRegion, *branches: tuple[Tensor, nn.Linear]) -> Tensor:
    """The sum over the group of the products of `branches`: this rank's x [B, S, in / size], and the row linear that
    is to read it, without its bias. Replicated [B, S, out], from every rank."""
    found, operands = [], []
    for x, linear in branches:
        add = adder_of(linear.weight, linear.kernels) if x.requires_grad else None
        found.append(_Branch(add, late_form(x) if add else None, linear.kernels))
        operands += in_autocast_dtype(x, linear.weight.detach() if add else linear.weight)
    total = _RoomForSum.apply(tuple(found), *operands)
    _fill(total.detach(), region, found, [operand.detach() for operand in operands])
    return total


def _fill(total: Tensor, region: TensorRegion, branches: list[_Branch], operands: list[Tensor]) -> None:
    total = total.flatten(0, -2)
    pairs = [(x.flatten(0, -2), w.t()) for x, w in zip(operands[::2], operands[1::2], strict=True)]
    messages = []
    for part in _parts(total.shape[0]):
        for index, ((x, weight), branch) in enumerate(zip(pairs, branches, strict=True)):
            product_(total[part], x[part], weight, keep=index > 0, backend=branch.backend)
        messages.append(start_all_reduce(total[part], region))
    for message in messages:
        message.wait()


def _parts(tokens: int) -> Iterator[slice]:
    parts = max(min(tokens // PART_TOKENS, MOST_PARTS), 1)
    step = -(-tokens // parts)
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))
