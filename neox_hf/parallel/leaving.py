"""Row linears that leave their region together and hide the message behind their own products.

    y = x + all-reduce(x1 W1^T + x2 W2^T) + b1 + b2

computed for most of the tokens and then for the rest: while the first sum travels, the products of the rest are
computed, and while the second does, the first is added to the stream. The products add where their sum is to lie, and
no pass of its own does. Of two summands that a rank has got (`exchange.py`), what adds them to the stream reads both.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neox_hf.kernels.bias_dropout_residual import bias_gradients, fill_residual_
from neox_hf.kernels.gelu_product import gelu_product_backward
from neox_hf.kernels.gradient_dtype import gradient_dtype
from neox_hf.kernels.late_tensor import LateTensor, late_form
from neox_hf.kernels.product import linear_product, product_
from neox_hf.kernels.weight_gradient import AddProduct, adder_of, gradient_or_sum
from neox_hf.parallel.messages import start_all_reduce
from neox_hf.parallel.operands import in_autocast_dtype
from neox_hf.parallel.tensor_region import TensorRegion

LAST_PART = 4
"""What the last part of the tokens is one of. Measured for Pythia-6.9B: docs/measurements/layouts_h200_x2.md."""

LEAST_TOKENS = 1024
"""Of the last part: the product of so many still fills a GPU."""


class BehindGelu(NamedTuple):
    """What a row linear reads where it is y = gelu(z + bias) of a column linear's product z.

    The gradient goes back to z, and to the bias, at once (`gelu_product_backward`): behind y there is no graph.
    makes_again: y is made again there, and not kept.
    """

    z: Tensor
    y: Tensor
    bias: Tensor
    form: str
    makes_again: bool


class _Branch(NamedTuple):
    """What the backward pass of one linear has to know, besides its operands. form: of the GELU it reads, if any."""

    add: AddProduct | None
    late: LateTensor | None
    form: str | None
    makes_again: bool
    backend: str


OPERANDS = 4
"""Of each branch: x, weight, and the z and bias of a GELU or None."""


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
        *operands: Tensor | None,
    ) -> Tensor:
        kept = list(operands)
        for index, branch in enumerate(branches):
            if branch.late or branch.makes_again:
                kept[OPERANDS * index] = None
        ctx.save_for_backward(*kept)
        ctx.branches, ctx.dtype = branches, operands[0].dtype
        biases = bias1, bias2, *operands[OPERANDS - 1 :: OPERANDS]
        wanted = *ctx.needs_input_grad[2:4], *ctx.needs_input_grad[4:][OPERANDS - 1 :: OPERANDS]
        ctx.bias_dtypes = [gradient_dtype(bias) if wants else None for bias, wants in zip(biases, wanted, strict=True)]
        dtype = torch.promote_types(stream.dtype, ctx.dtype)
        return torch.empty_like(stream, dtype=dtype, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved, gradients = ctx.saved_tensors, []
        _, wants_stream, _, _, *wanted = ctx.needs_input_grad
        for_biases = bias_gradients(gradient, *ctx.bias_dtypes[:2], backend=ctx.branches[0].backend)
        upstream = gradient.to(ctx.dtype)
        for index, branch in enumerate(ctx.branches):
            of_branch = slice(OPERANDS * index, OPERANDS * (index + 1))
            through = _back_through if branch.form is None else _back_through_gelu
            gradients += through(branch, upstream, saved[of_branch], wanted[of_branch], ctx.bias_dtypes[2 + index])
        return None, gradient if wants_stream else None, *for_biases, *gradients


Operands = Sequence[Tensor | None]


def _back_through(
    branch: _Branch, upstream: Tensor, operands: Operands, wanted: Sequence[bool], _: torch.dtype | None
) -> Operands:
    """The gradients of a linear's operands."""
    (x, weight, *_), (wants_x, wants_weight, *_) = operands, wanted
    for_x = linear_product(upstream, weight.t(), backend=branch.backend) if wants_x else None
    for_weight = gradient_or_sum(branch.add, upstream, x, wants_weight, late=branch.late, backend=branch.backend)
    return for_x, for_weight, None, None


def _back_through_gelu(
    branch: _Branch,
    upstream: Tensor,
    operands: Operands,
    wanted: Sequence[bool],
    sum_dtype: torch.dtype | None,
) -> Operands:
    """The gradients of a linear's operands where x is `BehindGelu`."""
    x, weight, z, bias = operands
    dz, dbias, again = gelu_product_backward(
        upstream, weight, z, bias, branch.form, sum_dtype, x is None, branch.backend
    )
    y = again if x is None else x
    for_weight = gradient_or_sum(branch.add, upstream, y, wanted[1], backend=branch.backend)
    return None, for_weight, dz, None if sum_dtype is None else dbias


@torch.compiler.disable  # messages are none of a compiler's business
def leave_by_parts(
    region: TensorRegion,
    stream: Tensor,
    first: tuple[Tensor | BehindGelu, nn.Linear],
    second: tuple[Tensor | BehindGelu, nn.Linear],
) -> Tensor:
    """stream [B, S, out], the same on every rank, + the sum over the group of both branches' products + their biases:
    this rank's x [B, S, in / size], and the row linear that is to read it."""
    found, operands = [], []
    for x, linear in (first, second):
        branch, of_branch = _branch(x, linear)
        found.append(branch)
        operands += of_branch
    biases = first[1].bias, second[1].bias
    joined = _RoomForStream.apply(tuple(found), stream, *biases, *operands)
    with torch.no_grad():
        _fill(joined.detach(), stream, biases, operands, region, found[0].backend)
    return joined


def _branch(x: Tensor | BehindGelu, linear: nn.Linear) -> tuple[_Branch, Operands]:
    if isinstance(x, BehindGelu):
        add = adder_of(linear.weight, linear.kernels)
        weight = linear.weight.detach() if add else linear.weight
        branch = _Branch(add, None, x.form, x.makes_again, linear.kernels)
        return branch, (x.y, weight, x.z, x.bias)
    add = adder_of(linear.weight, linear.kernels) if x.requires_grad else None
    operands = in_autocast_dtype(x, linear.weight.detach() if add else linear.weight)
    return _Branch(add, late_form(x) if add else None, None, False, linear.kernels), (*operands, None, None)


def _fill(
    joined: Tensor,
    stream: Tensor,
    biases: tuple[Tensor | None, Tensor | None],
    operands: list[Tensor | None],
    region: TensorRegion,
    backend: str,
) -> None:
    joined, stream, x1, x2 = (tensor.flatten(0, -2) for tensor in (joined, stream, *operands[::OPERANDS]))
    weight1, weight2 = (weight.t() for weight in operands[1::OPERANDS])
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
