"""The messages of a tensor group, started now and awaited later.

Tensors are [B batch, S sequence, H]; the sequence of a rank's share is S / size. Each function starts one message and
returns what awaits it; between starting and `wait` the caller computes something else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from neox_hf.parallel.exchange import Arrival
    from neox_hf.parallel.tensor_region import TensorRegion


@dataclass(frozen=True)
class Message:
    """What is under way. The tensor that travels is kept alive until it has arrived. beside: is awaited with it."""

    work: dist.Work
    travelling: Tensor
    unpack: Callable[[Tensor], Tensor]
    beside: "Message | None" = None

    def wait(self) -> Tensor:
        """The result. On CUDA the device waits, not this thread."""
        if self.beside is not None:
            self.beside.wait()
        self.work.wait()
        return self.unpack(self.travelling)

    def hand_to(self, use: Callable[[Tensor], object]) -> None:
        """Have `use` read the result, or, of an `Arrival`, the summands that it is made of."""
        use(self.wait())


def group_of(region: "TensorRegion") -> dist.ProcessGroup | None:
    """The region's process group; None is the whole world."""
    assert region.group is not None or dist.get_world_size() == region.size, "Topology.connect() was not called"
    return region.group


def start_all_reduce(tensor: Tensor, region: "TensorRegion") -> "Message | Arrival":
    """Sum `tensor` over the group, in place: by copies (`exchange.py`) where two devices can, else by the backend."""
    assert tensor.is_contiguous()
    arrival = region.exchange and region.exchange.start(tensor, out=tensor)
    return arrival or _by_backend(tensor, region)


def start_sum(tensor: Tensor, region: "TensorRegion", beside: Tensor | None = None) -> "Message | Arrival":
    """The sum of `tensor` over the group, which may have other readers and stays as it is. beside: a small tensor,
    contiguous, which is summed in place when this is awaited, and travels in the same message where copies carry it."""
    arrival = region.exchange and region.exchange.start(tensor.contiguous(), beside=beside)
    if arrival:
        return arrival
    message = _by_backend(tensor.clone(memory_format=torch.contiguous_format), region)
    return message if beside is None else replace(message, beside=_by_backend(beside, region))


class Several:
    """Small tensors as one that is to be summed over a group, `flat`. In fp32 at least: that sum comes before any other
    rounding."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._like = tensors
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self._dtype = flat.dtype
        self.flat = flat.to(torch.promote_types(flat.dtype, torch.float32))

    def apart(self) -> list[Tensor]:
        """What has become of each, in their order."""
        parts = self.flat.to(self._dtype).split([tensor.numel() for tensor in self._like])
        return [part.view_as(tensor) for part, tensor in zip(parts, self._like, strict=True)]


def _by_backend(tensor: Tensor, region: "TensorRegion") -> Message:
    return Message(dist.all_reduce(tensor, group=group_of(region), async_op=True), tensor, lambda summed: summed)


def start_gather(tensor: Tensor, region: "TensorRegion") -> Message:
    """The tensors of all ranks, stacked: [size, ...]."""
    stacked = tensor.new_empty((region.size, *tensor.shape))
    work = all_gather(stacked.flatten(0, 1), tensor.contiguous(), group=group_of(region), async_op=True)
    return Message(work, stacked, lambda shares: shares)


def start_gather_sequence(share: Tensor, region: "TensorRegion") -> Message:
    """[B, S / size, H] of each rank, joined to [B, S, H] in the order of the ranks."""
    return replace(start_gather(share, region), unpack=lambda shares: shares.transpose(0, 1).flatten(1, 2))


def start_reduce_scatter_sequence(partial: Tensor, region: "TensorRegion") -> Message:
    """The sum over the group of [B, S, H], of which this rank gets its share [B, S / size, H]."""
    shares = partial.unflatten(1, (region.size, -1)).transpose(0, 1).contiguous()
    mine = torch.empty_like(shares[0])
    work = reduce_scatter(mine, shares.flatten(0, 1), group=group_of(region), async_op=True)
    return Message(work, mine, lambda summed: summed)


# torch 2.13 renamed these two; the old names go when 2.13 is the oldest torch we run on.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
