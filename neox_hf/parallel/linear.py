"""Linears whose matrix is split over a tensor group, and how their backward pass hides its messages.

A column linear holds some of the outputs and gives this rank's; a row linear holds some of the inputs and gives a
partial sum, which the caller `leave`s with. Both are constructed with the sizes of the whole and keep the names of
`nn.Linear`'s parameters; in a group of one, `column_linear` and `row_linear` give a plain `nn.Linear`.

Between the two products of a column linear's backward pass a message is due: the gradient of its input is partial. It
travels while the gradient of the weight is computed:

- under sequence parallelism inside the linear, whose own input has to be gathered once more too;
- else in `enter`, which stands before the norms and serves all column linears behind them with one message.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neox_hf.kernels.autocast import autocast_dtype
from neox_hf.parallel.messages import start_all_reduce, start_gather_sequence, start_reduce_scatter_sequence
from neox_hf.parallel.shards import Shard, Sharded
from neox_hf.parallel.tensor_region import TensorRegion


def column_linear(in_features: int, out_features: int, region: TensorRegion, *, bias: bool = True) -> nn.Linear:
    """A linear whose outputs are split over the region."""
    if region.size == 1:
        return nn.Linear(in_features, out_features, bias=bias)
    return ColumnParallelLinear(in_features, out_features, region, bias=bias)


def row_linear(in_features: int, out_features: int, region: TensorRegion, *, bias: bool = True) -> nn.Linear:
    """A linear whose inputs are split over the region."""
    if region.size == 1:
        return nn.Linear(in_features, out_features, bias=bias)
    return RowParallelLinear(in_features, out_features, region, bias=bias)


class ColumnParallelLinear(nn.Linear, Sharded):
    """[..., in] -> this rank's [..., out / size] of x W^T + b.

    Under sequence parallelism x is scattered, [B, S / size, in], and the result has the whole sequence. The gradient of
    x is partial, but reduced under sequence parallelism.

    Raises:
        TopologyError: the outputs do not divide by the size.
    """

    def __init__(self, in_features: int, out_features: int, region: TensorRegion, *, bias: bool = True) -> None:
        super().__init__(in_features, region.share(out_features, "out_features"), bias=bias)
        self.region = region
        self.whole_out_features = out_features
        self._postponed: PostponedGradients | None = None

    def forward(self, x: Tensor) -> Tensor:
        region = self.region.in_mode(self.training)
        postponed, self._postponed = self._postponed, None
        if region.sequence:
            return _gathered_linear(region, *_in_autocast_dtype(x, self.weight, self.bias))
        if postponed is not None:
            bias = None if self.bias is None else self.bias.detach()
            return _postponing_linear(postponed, *_in_autocast_dtype(x, self.weight.detach(), bias))
        return F.linear(x, self.weight, self.bias)

    def postpone(self, postponed: "PostponedGradients") -> None:
        """The next forward pass leaves the gradients of weight and bias to `postponed`."""
        self._postponed = postponed

    def shards(self) -> dict[str, Shard]:
        whole, rank, size = self.whole_out_features, self.region.rank, self.region.size
        weight = Shard.of_rank(0, (whole, self.in_features), rank, size)
        bias = Shard.of_rank(0, (whole,), rank, size)
        return {"weight": weight} if self.bias is None else {"weight": weight, "bias": bias}


class RowParallelLinear(nn.Linear, Sharded):
    """This rank's [..., in / size] -> its summand of x W^T + b. The bias, whole on every rank, is added by the first.

    Raises:
        TopologyError: the inputs do not divide by the size.
    """

    def __init__(self, in_features: int, out_features: int, region: TensorRegion, *, bias: bool = True) -> None:
        super().__init__(region.share(in_features, "in_features"), out_features, bias=bias)
        self.region = region
        self.whole_in_features = in_features

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.region.first_only(self.bias))

    def shards(self) -> dict[str, Shard]:
        whole = (self.out_features, self.whole_in_features)
        return {"weight": Shard.of_rank(1, whole, self.region.rank, self.region.size)}


def enter(x: Tensor, region: TensorRegion, *branches: nn.Module) -> Tensor:
    """`region.enter(x)`, whose message in the backward pass travels while weight gradients of `branches` are computed.

    branches: modules that read x, or what norms made of it, by column linears.
    """
    if region.size == 1 or region.sequence:
        return x
    return _enter_ahead_of(branches, region, x)


class PostponedGradients:
    """Gradients of one linear's weight and bias, computed when somebody takes them.

    Lives for one forward pass and its backward pass. The linear gives what they are computed from.
    """

    def __init__(self) -> None:
        self._operands: tuple[Tensor, Tensor] | None = None

    def give(self, gradient: Tensor, x: Tensor) -> None:
        self._operands = (gradient, x)

    def take(self, wanted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
        """The gradients that are `wanted`; none if the linear had no part in the loss."""
        operands, self._operands = self._operands, None
        return (None, None) if operands is None else weight_gradients(*operands, wanted)


def weight_gradients(gradient: Tensor, x: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """Of weight [out, in] and bias [out], from the output's gradient [..., out] and x [..., in]."""
    gradient = gradient.flatten(0, -2)
    weight = gradient.t() @ x.flatten(0, -2) if wanted[0] else None
    return weight, gradient.sum(0) if wanted[1] else None


class _EnterAheadOf(torch.autograd.Function):
    """Identity on x. Takes the parameters too, so that their gradients can come from here."""

    @staticmethod
    def forward(
        ctx: Any, region: TensorRegion, postponed: list[PostponedGradients], x: Tensor, *parameters: Tensor | None
    ) -> Tensor:
        ctx.region, ctx.postponed = region, postponed
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, partial: Tensor) -> tuple[Tensor | None, ...]:
        wants_x, *wanted = ctx.needs_input_grad[2:]
        # A copy: the incoming gradient may have other readers.
        travelling = partial.clone(memory_format=torch.contiguous_format) if wants_x else None
        message = None if travelling is None else start_all_reduce(travelling, ctx.region)
        gradients: list[Tensor | None] = []
        for index, postponed in enumerate(ctx.postponed):
            gradients += postponed.take((wanted[2 * index], wanted[2 * index + 1]))
        return None, None, message and message.wait(), *gradients


class _PostponingLinear(torch.autograd.Function):
    """x W^T + b, which computes the gradient of x alone."""

    @staticmethod
    def forward(ctx: Any, postponed: PostponedGradients, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.postponed = postponed
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.postponed.give(gradient, x)
        return None, gradient @ weight, None, None


class _GatheredLinear(torch.autograd.Function):
    """x W^T + b of scattered x. Keeps its part of x and gathers the rest again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, region: TensorRegion, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.region = region
        ctx.save_for_backward(x, weight)
        return F.linear(start_gather_sequence(x, region).wait(), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _, wants_x, *wanted = ctx.needs_input_grad
        x, weight = ctx.saved_tensors
        gathering = start_gather_sequence(x, ctx.region) if wanted[0] else None
        reducing = start_reduce_scatter_sequence(gradient @ weight, ctx.region) if wants_x else None
        whole = gathering.wait() if gathering else x
        gradients = weight_gradients(gradient, whole, wanted)
        return None, reducing and reducing.wait(), *gradients


@torch.compiler.disable
def _enter_ahead_of(branches: tuple[nn.Module, ...], region: TensorRegion, x: Tensor) -> Tensor:
    modules = [module for branch in branches for module in branch.modules()]
    postponing = [m for m in modules if isinstance(m, ColumnParallelLinear) and m.weight.requires_grad]
    postponed = [PostponedGradients() for _ in postponing]
    for column, gradients in zip(postponing, postponed, strict=True):
        column.postpone(gradients)
    parameters = [parameter for column in postponing for parameter in (column.weight, column.bias)]
    return _EnterAheadOf.apply(region, postponed, x, *parameters)


def _in_autocast_dtype(*operands: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast would make of the operands of a linear; it does not reach into an autograd function."""
    dtype = autocast_dtype(operands[0].device)
    if dtype is None:
        return operands
    return tuple(operand if operand is None else operand.to(dtype) for operand in operands)


# A compiler splits its graph here: messages are none of its business.
_postponing_linear = torch.compiler.disable(_PostponingLinear.apply)
_gathered_linear = torch.compiler.disable(_GatheredLinear.apply)
