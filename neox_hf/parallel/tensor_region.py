"""The places where ranks of a tensor group meet inside the model, each with what it does to gradients.

Inside a region activations are split: each rank holds some heads, or some columns of the MLP, and what it computes for
the residual stream, or for a gradient of it, is *partial*: one summand of `size`. Outside they are *replicated* (every
rank holds the same), or under sequence parallelism *scattered* (rank r holds the r-th part of the sequence).

    name               forward                  backward
    enter              nothing                  all-reduce of partial gradients
    leave              all-reduce               nothing
      with sequence:   reduce-scatter           all-gather
    gather_sequence    all-gather               reduce-scatter of partial gradients
    scatter_sequence   this rank's part         all-gather
    shared             nothing                  all-reduce of several parameters' partial gradients, in one message
    first_only         zeros but on rank 0      nothing

Source: Shoeybi et al., 2019, arXiv 1909.08053; sequence parallelism: Korthikanti et al., 2022, arXiv 2205.05198.
"""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neox_hf.errors import TopologyError
from neox_hf.parallel.exchange import Exchange
from neox_hf.parallel.messages import (
    Several,
    group_of,
    start_all_reduce,
    start_gather_sequence,
    start_reduce_scatter_sequence,
    start_sum,
)
from neox_hf.parallel.random import own_random
from neox_hf.parallel.topology import Topology


@dataclass(frozen=True)
class TensorRegion:
    """One rank's place in its tensor group. In a group of one every method is an identity.

    sequence: outside the region activations are scattered, not replicated.
    """

    size: int = 1
    rank: int = 0
    sequence: bool = False
    group: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)
    exchange: Exchange | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, topology: Topology | None) -> "TensorRegion":
        """The region of this process; None is a process alone."""
        if topology is None or topology.tensor == 1:
            return cls()
        groups = topology.groups
        return cls(topology.tensor, topology.tensor_rank, topology.sequence, groups.tensor, groups.exchange)

    def in_mode(self, training: bool) -> "TensorRegion":
        """The region that a module computes in: sequence parallelism spares what backward passes keep, so it is for
        training alone, and any length can be evaluated or generated."""
        return self if training or not self.sequence else dataclasses.replace(self, sequence=False)

    def share(self, total: int, what: str) -> int:
        """This rank's share of `total`.

        Raises:
            TopologyError: it does not divide; `what` names it.
        """
        if total % self.size:
            fitting = [size for size in range(1, self.size) if total % size == 0]
            raise TopologyError(
                f"{what}={total} does not divide by parallel.tensor={self.size}; "
                f"make it a multiple of {self.size}, or use fewer ranks: {', '.join(map(str, fitting))}"
            )
        return total // self.size

    def enter(self, x: Tensor) -> Tensor:
        """Replicated x, whose gradient comes back partial. Scattered x passes: whoever gathers it reduces."""
        return x if self.size == 1 or self.sequence else _enter(self, x)

    def leave(self, partial: Tensor) -> Tensor:
        """Partial [B, S, H] -> replicated [B, S, H], or scattered [B, S / size, H].

        Raises:
            TopologyError: with `sequence`, S does not divide by the size.
        """
        return partial if self.size == 1 else _leave(self, partial)

    def leave_together(self, *partials: Tensor) -> tuple[Tensor, ...]:
        """What several branches add to the residual stream: each branch, or their sum in one message."""
        return partials if self.size == 1 else (_leave(self, *partials),)

    def shared(self, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
        """Whole parameters that every rank reads, but for gradients of its own part alone."""
        return parameters if self.size == 1 or not parameters else _shared(self, *parameters)

    def first_only(self, bias: Tensor | None) -> Tensor | None:
        """A bias to add to a partial sum: once over all ranks. Each copy gets the whole gradient, as it is replicated
        where the sum is."""
        return bias if self.size == 1 or bias is None else _first_only(self, bias)

    def gather_sequence(self, x: Tensor) -> Tensor:
        """Scattered [B, S / size, H] -> [B, S, H], whose gradient comes back partial."""
        return _gather_sequence(self, x) if self.sequence else x

    def scatter_sequence(self, x: Tensor) -> Tensor:
        """Replicated [B, S, H] -> this rank's [B, S / size, H].

        Raises:
            TopologyError: S does not divide by the size.
        """
        return _scatter_sequence(self, x) if self.sequence else x

    def with_whole_sequence(self, x: Tensor) -> Tensor:
        """A tensor of the shape, dtype and device that gathered x would have; its values mean nothing."""
        return x[:, :1].expand(-1, x.shape[1] * self.size, -1) if self.sequence else x

    def all_max_(self, tensor: Tensor) -> Tensor:
        """The largest of every rank's elements, in place. No gradient passes."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group_of(self))
        return tensor

    def all_sum_(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's elements, in place. No gradient passes."""
        if self.size > 1:
            dist.all_reduce(tensor, group=group_of(self))
        return tensor

    def residual_random(self, device: torch.device, probability: float = 1.0) -> AbstractContextManager[None]:
        """A context for dropout of the residual stream: its masks differ where it is scattered, else they agree."""
        return self.own_random(device, probability) if self.sequence else nullcontext()

    def own_random(self, device: torch.device, probability: float = 1.0) -> AbstractContextManager[None]:
        """A context for dropout of what is split here: masks of the ranks differ. Nothing is drawn at probability 0."""
        if self.size == 1 or probability == 0:
            return nullcontext()
        return own_random(self.rank, self.size, device)


ALONE = TensorRegion()
"""The region of a process that shares no tensor."""


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, region: TensorRegion, x: Tensor) -> Tensor:
        ctx.region = region
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, partial: Tensor) -> tuple[None, Tensor]:
        return None, start_sum(partial, ctx.region).wait()  # the gradient may have other readers


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, region: TensorRegion, first: Tensor, *others: Tensor) -> Tensor:
        ctx.region, ctx.branches = region, 1 + len(others)
        total = sum(others[1:], first + others[0]) if others else first
        if region.sequence:
            region.share(total.shape[1], SEQUENCE_LENGTH)
            return start_reduce_scatter_sequence(total, region).wait()
        return (start_all_reduce if others else start_sum)(total, region).wait()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.region.sequence:
            gradient = start_gather_sequence(gradient, ctx.region).wait()
        return None, *[gradient] * ctx.branches


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, region: TensorRegion, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.region = region
        return tuple(None if p is None else p.view_as(p) for p in parameters)

    @staticmethod
    def backward(ctx: Any, *partials: Tensor | None) -> tuple[Tensor | None, ...]:
        present = [partial for partial in partials if partial is not None]
        several = Several(present)
        start_all_reduce(several.flat, ctx.region).wait()
        whole = iter(several.apart())
        return None, *(None if partial is None else next(whole) for partial in partials)


class _FirstOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, region: TensorRegion, bias: Tensor) -> Tensor:
        return bias.view_as(bias) if region.rank == 0 else torch.zeros_like(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, region: TensorRegion, x: Tensor) -> Tensor:
        ctx.region = region
        return start_gather_sequence(x, region).wait()

    @staticmethod
    def backward(ctx: Any, partial: Tensor) -> tuple[None, Tensor]:
        return None, start_reduce_scatter_sequence(partial, ctx.region).wait()


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, region: TensorRegion, x: Tensor) -> Tensor:
        ctx.region = region
        share = region.share(x.shape[1], SEQUENCE_LENGTH)
        return x.narrow(1, region.rank * share, share).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, start_gather_sequence(gradient, ctx.region).wait()


SEQUENCE_LENGTH = "parallel.sequence is on, and the sequence length"


# A compiler splits its graph here: messages are none of its business.
_enter = torch.compiler.disable(_Enter.apply)
_leave = torch.compiler.disable(_Leave.apply)
_shared = torch.compiler.disable(_Shared.apply)
_first_only = torch.compiler.disable(_FirstOnly.apply)
_gather_sequence = torch.compiler.disable(_GatherSequence.apply)
_scatter_sequence = torch.compiler.disable(_ScatterSequence.apply)
