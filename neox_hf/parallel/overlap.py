"""A column linear's backward pass, which hides its messages behind a product.

Between its two products a message is due: the gradient of its input is partial. It travels while the gradient of the
weight is computed:

- under sequence parallelism inside the linear, whose own input has to be gathered once more too;
- else in `enter`, which stands before the norms and serves all column linears behind them with one message. They leave
  the gradients of their weights to it: it has them computed when its message has started. What the norms read, whole on
  every rank, comes through it as well: their gradients are partial too, and travel beside.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neox_hf.kernels.gelu_product import gelu_product
from neox_hf.kernels.late_tensor import LateTensor, late_form
from neox_hf.kernels.product import linear_product
from neox_hf.kernels.weight_gradient import AddProduct, adder_of
from neox_hf.parallel.exchange import Arrival
from neox_hf.parallel.messages import (
    Message,
    Several,
    start_all_reduce,
    start_gather_sequence,
    start_reduce_scatter_sequence,
    start_sum,
)
from neox_hf.parallel.operands import in_autocast_dtype, weight_gradients
from neox_hf.parallel.tensor_region import TensorRegion


class PostponedGradients:
    """Gradients of one linear's weight and bias, computed when somebody takes them.

    Lives for one forward pass and its backward pass. The linear gives what they are computed from.
    """

    def __init__(self, add: AddProduct | None) -> None:
        self._add = add
        self._operands: tuple[Tensor, Tensor, bool, str] | None = None

    @property
    def adds(self) -> bool:
        """Whether the weight's gradient is added somewhere, and no one waits to be given it."""
        return self._add is not None

    def give(self, gradient: Tensor, x: Tensor, biased: bool, backend: str) -> None:
        self._operands = (gradient, x, biased, backend)

    def take(self, wanted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
        """The gradients that are `wanted`; none if the linear had no part in the loss, or its bias none in it."""
        operands, self._operands = self._operands, None
        if operands is None:
            return None, None
        gradient, x, biased, backend = operands
        return weight_gradients(self._add, gradient, x, (wanted[0], wanted[1] and biased), backend)


class _EnterAheadOf(torch.autograd.Function):
    """Identity on x and on the first `shared` parameters. Takes those of the linears too, so that their gradients can
    come from here."""

    @staticmethod
    def forward(
        ctx: Any,
        region: TensorRegion,
        postponed: list[PostponedGradients],
        shared: int,
        x: Tensor,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.region, ctx.postponed, ctx.shared = region, postponed, shared
        return x.view_as(x), *(parameter.view_as(parameter) for parameter in parameters[:shared])

    @staticmethod
    def backward(ctx: Any, partial: Tensor, *partials: Tensor) -> tuple[Tensor | None, ...]:
        wants_x, *wanted = ctx.needs_input_grad[3:]
        several = Several(partials) if any(wanted[: ctx.shared]) else None
        message = _start(partial if wants_x else None, several, ctx.region)
        gradients: list[Tensor | None] = []
        for index, postponed in enumerate(ctx.postponed):
            at = ctx.shared + 2 * index
            gradients += postponed.take((wanted[at], wanted[at + 1]))
        total = message and message.wait()
        shared = several.apart() if several else [None] * ctx.shared
        return None, None, None, total if wants_x else None, *shared, *gradients


def _start(partial: Tensor | None, several: Several | None, region: TensorRegion) -> Message | Arrival | None:
    """The sum of `partial`, which may have other readers, with those of `several` in place; of what there is."""
    if partial is not None:
        return start_sum(partial, region, beside=several and several.flat)
    return several and start_all_reduce(several.flat, region)


class _PostponingLinear(torch.autograd.Function):
    """x W^T + b, which computes the gradient of x alone."""

    @staticmethod
    def forward(
        ctx: Any,
        postponed: PostponedGradients,
        late: LateTensor | None,
        biased: bool,
        backend: str,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.postponed, ctx.late, ctx.biased, ctx.backend = postponed, late, biased, backend
        ctx.save_for_backward(weight, None if late else x)
        return linear_product(x, weight, bias, backend=backend)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, _gradient_of_input(ctx, gradient), None, None


def _gradient_of_input(ctx: Any, gradient: Tensor) -> Tensor:
    """The others are postponed."""
    weight, x = ctx.saved_tensors
    if ctx.late is None:
        ctx.postponed.give(gradient, x, ctx.biased, ctx.backend)
    else:  # there before it is taken: what makes x stands behind `enter`
        ctx.late.when_there(lambda again: ctx.postponed.give(gradient, again, ctx.biased, ctx.backend))
    return linear_product(gradient, weight.t(), backend=ctx.backend)


class _PostponingGelu(torch.autograd.Function):
    """z = x W^T with a gradient as `_PostponingLinear`'s, and gelu(z + b) without any."""

    @staticmethod
    def forward(
        ctx: Any,
        postponed: PostponedGradients,
        late: LateTensor | None,
        form: str,
        backend: str,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.postponed, ctx.late, ctx.biased, ctx.backend = postponed, late, False, backend
        ctx.save_for_backward(weight, None if late else x)
        z, y = gelu_product(x, weight, bias, form, backend)
        ctx.mark_non_differentiable(y)
        ctx.set_materialize_grads(False)  # autograd would fill a tensor like y with zeros
        return z, y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
        return None, None, None, None, _gradient_of_input(ctx, gradient), None, None


class _GatheredLinear(torch.autograd.Function):
    """x W^T + b of scattered x. Keeps its part of x and gathers the rest again for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        region: TensorRegion,
        add: AddProduct | None,
        late: LateTensor | None,
        backend: str,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.region, ctx.add, ctx.late, ctx.backend = region, add, late, backend
        ctx.save_for_backward(weight, None if late else x)
        return linear_product(start_gather_sequence(x, region).wait(), weight, bias, backend=backend)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *_, wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        (weight, x), region, add = ctx.saved_tensors, ctx.region, ctx.add

        def reducing_for_x() -> Message:
            return start_reduce_scatter_sequence(linear_product(gradient, weight.t(), backend=ctx.backend), region)

        if ctx.late is not None:
            reducing = reducing_for_x()
            ctx.late.when_there(lambda again: _add_gathered(add, gradient, start_gather_sequence(again, region)))
            for_bias = gradient.flatten(0, -2).sum(0) if wants_bias else None
            return None, None, None, None, reducing.wait(), None, for_bias
        gathering = start_gather_sequence(x, region) if add or wants_weight else None
        reducing = reducing_for_x() if wants_x else None
        whole = gathering.wait() if gathering else x
        gradients = weight_gradients(add, gradient, whole, (wants_weight, wants_bias), ctx.backend)
        return None, None, None, None, reducing and reducing.wait(), *gradients


def _add_gathered(add: AddProduct, gradient: Tensor, gathering: Message) -> None:
    add(gradient.flatten(0, -2), gathering.wait().flatten(0, -2))


# A compiler splits its graph in front of the functions below: messages are none of its business.


@torch.compiler.disable
def enter_ahead_of(
    region: TensorRegion,
    x: Tensor,
    shared: Sequence[Tensor],
    postponed: list[PostponedGradients],
    parameters: list[tuple[Tensor | None, Tensor | None]],
) -> tuple[Tensor, ...]:
    """x and the `shared` parameters, behind which linears postpone the gradients of their `parameters`, (weight, bias)
    each; None for a weight whose gradients are summed elsewhere."""
    of_linears = (tensor for pair in parameters for tensor in pair)
    return _EnterAheadOf.apply(region, postponed, len(shared), x, *shared, *of_linears)


@torch.compiler.disable
def postponing_linear(
    postponed: PostponedGradients, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str
) -> Tensor:
    """x W^T + b, whose backward pass gives the gradient of x, and to `postponed` what the others are computed from: but
    for a bias that is detached. backend: of `kernels.product.product_`, here and below."""
    biased, bias = (False, None) if bias is None else (bias.requires_grad, bias.detach())
    late = late_form(x) if postponed.adds else None
    return _PostponingLinear.apply(postponed, late, biased, backend, *in_autocast_dtype(x, weight.detach(), bias))


@torch.compiler.disable
def postponing_gelu(
    postponed: PostponedGradients, x: Tensor, weight: Tensor, bias: Tensor, form: str, backend: str
) -> tuple[Tensor, Tensor]:
    """z = x W^T, whose backward pass is `postponing_linear`'s, and gelu(z + b), through which no gradient flows."""
    late = late_form(x) if postponed.adds else None
    return _PostponingGelu.apply(postponed, late, form, backend, x, weight.detach(), bias.detach())


@torch.compiler.disable
def gathered_linear(region: TensorRegion, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """x W^T + b of scattered x [B, S / size, in] for the whole sequence. The gradient of x is whole, and scattered."""
    add = adder_of(weight, backend) if x.requires_grad else None
    late, weight = (None, weight) if add is None else (late_form(x), weight.detach())
    return _GatheredLinear.apply(region, add, late, backend, *in_autocast_dtype(x, weight, bias))
