"""Parts of parameters: replicas hold the same weights, and each steps a part of them.

A parameter whose elements divide is cut into as many parts as there are replicas. Each replica is sent the mean
gradients of its parts, keeps the optimizer's state of these alone, steps them, and sends out what they have become. So
half of an all-reduce of gradients travels and half of one of weights, and no replica repeats what another has stepped.

Source: Rajbhandari et al. 2020, arXiv 1910.02054 (ZeRO, stage 1).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Private to torch, which has no public way to send several tensors in one message.
from torch.distributed.distributed_c10d import _coalescing_manager

from neox_hf.parallel.messages import all_gather, reduce_scatter

ALIGNED_ELEMENTS = 8
"""Parts begin where the widest vector access, 16 bytes, may be used on bf16."""


class ParameterPart(nn.Parameter):
    """Consecutive elements of `whole` from `start` on, flat, in the same memory."""

    whole: nn.Parameter
    start: int


class Arrival(Protocol):
    """What is under way."""

    def wait(self) -> object:
        """On CUDA the device waits, not this thread."""


class ReplicaParts:
    """This replica's parts of `parameters`.

    Args:
        parameters: whole, in the memory that they stay in.
        group: ranks that hold replicas; None is the whole world.

    share_cut: of all elements, those of parameters that are cut.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self._rank, self._count = dist.get_rank(group), dist.get_world_size(group)
        given = list(parameters)
        cut = [p for p in given if p.is_contiguous() and has_parts(p.numel(), self._count)]
        self._parts = {parameter: _part_of(parameter, self._rank, self._count) for parameter in cut}
        self.share_cut: float = sum(p.numel() for p in cut) / sum(p.numel() for p in given)

    def __contains__(self, parameter: nn.Parameter) -> bool:
        """Whether it is cut."""
        return parameter in self._parts

    def of(self, parameter: nn.Parameter) -> nn.Parameter:
        """What this replica steps of it: its part, or, as every replica does, all of one that is not cut."""
        return self._parts.get(parameter, parameter)

    def cut(self, parameter: nn.Parameter, values: Tensor) -> Tensor:
        """Those of `values`, one for each element of a parameter that is cut, that belong to its part: a view, flat."""
        part = self._parts[parameter]
        return values.view(-1).narrow(0, part.start, part.numel())

    def start_reduction(self, pairs: Sequence[tuple[Tensor, Tensor]], operation: dist.ReduceOp) -> Arrival:
        """In one message: of each pair the first, this replica's cut of the second, becomes that of all replicas' sum
        or mean. Elsewhere the second has no meaning then."""
        with _coalescing_manager(self.group, async_ops=True) as message:
            for cut, whole in pairs:
                reduce_scatter(cut, whole.view(-1), operation, group=self.group)
        return message

    def start_gather(self, stepped: Iterable[nn.Parameter]) -> Arrival:
        """In one message: the parts among `stepped` go to all replicas, and theirs come."""
        with _coalescing_manager(self.group, async_ops=True) as message:
            for part in stepped:
                if isinstance(part, ParameterPart):
                    whole = part.whole.detach().view(-1)
                    at = whole.data_ptr() + part.start * whole.element_size()
                    assert part.data_ptr() == at, "a parameter has moved since it was cut"
                    all_gather(whole, part.detach(), group=self.group)
        return message

    def gather(self) -> None:
        """All parts, now."""
        self.start_gather(self._parts.values()).wait()

    def counts(self, stepped: nn.Parameter) -> bool:
        """Whether a sum over replicas takes it from this one: of those that all of them step one does."""
        return isinstance(stepped, ParameterPart) or self._rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Over the replicas, in place."""
        dist.all_reduce(value, group=self.group)
        return value


def has_parts(elements: int, replicas: int) -> bool:
    """Whether a parameter of so many is cut among so many: into equal parts that begin aligned."""
    return elements % (replicas * ALIGNED_ELEMENTS) == 0


def _part_of(parameter: nn.Parameter, rank: int, count: int) -> ParameterPart:
    share = parameter.numel() // count
    part = ParameterPart(parameter.detach().view(-1).narrow(0, rank * share, share))
    part.whole, part.start = parameter, rank * share
    part.grad_dtype = torch.float32
    return part


def pieces_of(parameters: Iterable[Tensor], elements: float) -> Iterator[list[Tensor]]:
    """Consecutive ones together, up to so many elements; a larger one alone."""
    piece, room = [], elements
    for parameter in parameters:
        if piece and parameter.numel() > room:
            yield piece
            piece, room = [], elements
        piece.append(parameter)
        room -= parameter.numel()
    if piece:
        yield piece
