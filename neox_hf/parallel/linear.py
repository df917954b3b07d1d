"""Linears whose matrix is split over a tensor group.

A column linear holds some of the outputs and gives this rank's; a row linear holds some of the inputs and gives a
partial sum, which the caller `leave`s with. Both are constructed with the sizes of the whole and keep the names of
`nn.Linear`'s parameters; in a group of one, `column_linear` and `row_linear` give a plain `Linear`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from neox_hf.kernels.fp8_linear import Fp8Linear, fp8_linear
from neox_hf.kernels.linear import linear
from neox_hf.kernels.weight_gradient import adder_of
from neox_hf.parallel.overlap import (
    PostponedGradients,
    enter_ahead_of,
    gathered_linear,
    postponing_gelu,
    postponing_linear,
)
from neox_hf.parallel.shards import Shard, Sharded
from neox_hf.parallel.tensor_region import TensorRegion


class Linear(nn.Linear):
    """torch's linear, computed by `kernels.linear`.

    fp8: what it needs to train in eight bits, where it is to (`compute_in_fp8`). What is evaluated is the weights
    that are saved, in their own precision. kernels: `auto | triton | torch`; `torch` has torch compute products.
    """

    fp8: Fp8Linear | None = None
    kernels: str = "auto"

    @property
    def trains_in_fp8(self) -> bool:
        return self.fp8 is not None and self.training

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """x W^T; the bias is left to who adds it in passing."""
        return self._product(x, None)

    @property
    def may_leave_bias(self) -> bool:
        """Whether `leaving_bias` may be called."""
        return self.bias is not None and not self.trains_in_fp8

    def leaving_bias(self, x: Tensor) -> Tensor:
        """x W^T + b, where the gradient of b is left to who sums it in passing."""
        return self._product(x, self.bias.detach())

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.trains_in_fp8:
            return fp8_linear(x, self.weight, bias, self.fp8)
        return linear(x, self.weight, bias, backend=self.kernels)


def column_linear(
    in_features: int, out_features: int, region: TensorRegion, *, bias: bool = True, kernels: str = "auto"
) -> nn.Linear:
    """A linear whose outputs are split over the region."""
    return _linear(ColumnParallelLinear, in_features, out_features, region, bias, kernels)


def row_linear(
    in_features: int, out_features: int, region: TensorRegion, *, bias: bool = True, kernels: str = "auto"
) -> nn.Linear:
    """A linear whose inputs are split over the region."""
    return _linear(RowParallelLinear, in_features, out_features, region, bias, kernels)


def _linear(
    split: type[nn.Linear], in_features: int, out_features: int, region: TensorRegion, bias: bool, kernels: str
) -> nn.Linear:
    alone = region.size == 1
    linear = Linear(in_features, out_features, bias) if alone else split(in_features, out_features, region, bias=bias)
    linear.kernels = kernels
    return linear


class ColumnParallelLinear(nn.Linear, Sharded):
    """[..., in] -> this rank's [..., out / size] of x W^T + b.

    Under sequence parallelism x is scattered, [B, S / size, in], and the result has the whole sequence. The gradient of
    x is partial, but reduced under sequence parallelism.

    Raises:
        TopologyError: the outputs do not divide by the size.
    """

    kernels: str = "auto"

    def __init__(self, in_features: int, out_features: int, region: TensorRegion, *, bias: bool = True) -> None:
        super().__init__(in_features, region.share(out_features, "out_features"), bias=bias)
        self.region = region
        self.whole_out_features = out_features
        self._postponed: PostponedGradients | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """This rank's part of x W^T; the bias is left to who adds it in passing."""
        return self._product(x, None)

    @property
    def may_leave_bias(self) -> bool:
        """Whether `leaving_bias` may be called."""
        return self.bias is not None

    def leaving_bias(self, x: Tensor) -> Tensor:
        """This rank's part of x W^T + b, where the gradient of b is left to who sums it in passing."""
        return self._product(x, self.bias.detach())

    @property
    def postpones(self) -> bool:
        """Whether the next forward pass does."""
        return self._postponed is not None

    def product_and_gelu(self, x: Tensor, form: str) -> tuple[Tensor, Tensor]:
        """This rank's part z of x W^T, and gelu(z + b), through which no gradient flows; where it `postpones`."""
        postponed, self._postponed = self._postponed, None
        assert postponed is not None, "who calls this has asked `postpones`"
        return postponing_gelu(postponed, x, self.weight, self.bias, form, self.kernels)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        region = self.region.in_mode(self.training)
        postponed, self._postponed = self._postponed, None
        if region.sequence:
            return gathered_linear(region, x, self.weight, bias, self.kernels)
        if postponed is not None:
            return postponing_linear(postponed, x, self.weight, bias, self.kernels)
        return linear(x, self.weight, bias, backend=self.kernels)

    def postpone(self, postponed: PostponedGradients) -> None:
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

    kernels: str = "auto"

    def __init__(self, in_features: int, out_features: int, region: TensorRegion, *, bias: bool = True) -> None:
        super().__init__(region.share(in_features, "in_features"), out_features, bias=bias)
        self.region = region
        self.whole_in_features = in_features

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.region.first_only(self.bias), backend=self.kernels)

    def shards(self) -> dict[str, Shard]:
        whole = (self.out_features, self.whole_in_features)
        return {"weight": Shard.of_rank(1, whole, self.region.rank, self.region.size)}


def enter(
    x: Tensor, region: TensorRegion, shared: Sequence[Tensor], *branches: nn.Module
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`region.enter(x)` and `region.shared(*shared)`, whose messages in the backward pass travel while weight gradients
    of `branches` are computed.

    shared: parameters, none missing, of the norms behind x. branches: modules that read what the norms make of x, or x,
    by column linears.
    """
    if region.size == 1 or region.sequence:
        return x, region.shared(*shared)
    return _enter_and_postpone(branches, region, x, shared)


@torch.compiler.disable  # what a module remembers until its next call is no part of a graph
def _enter_and_postpone(
    branches: tuple[nn.Module, ...], region: TensorRegion, x: Tensor, shared: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    modules = [module for branch in branches for module in branch.modules()]
    columns = [m for m in modules if isinstance(m, ColumnParallelLinear) and m.weight.requires_grad]
    adders = [adder_of(column.weight, column.kernels) if x.requires_grad else None for column in columns]
    postponed = [PostponedGradients(add) for add in adders]
    for column, gradients in zip(columns, postponed, strict=True):
        column.postpone(gradients)
    pairs = zip(columns, adders, strict=True)
    parameters = [(None if add else column.weight, column.bias) for column, add in pairs]
    trained = [parameter for parameter in shared if parameter.requires_grad]
    entered, *whole = enter_ahead_of(region, x, trained, postponed, parameters)
    inside = iter(whole)
    return entered, tuple(next(inside) if parameter.requires_grad else parameter for parameter in shared)
