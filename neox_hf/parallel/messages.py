"""The messages of a tensor group, started now and awaited later.

Tensors are [B batch, S sequence, H]; the sequence of a rank's share is S / size. Each function starts one message and
returns a `Message`; between starting and `wait` the caller computes something else.
"""

from collections.abc import Callable
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
    """What is under way. The tensor that travels is kept alive until it has arrived."""

    work: "dist.Work | Arrival"
    travelling: Tensor
    unpack: Callable[[Tensor], Tensor]

    def wait(self) -> Tensor:
        """The result. On CUDA the device waits, not this thread."""
        self.work.wait()
        return self.unpack(self.travelling)


def group_of(region: "TensorRegion") -> dist.ProcessGroup | None:
    """The region's process group; None is the whole world."""
    assert region.group is not None or dist.get_world_size() == region.size, "Topology.connect() was not called"
    return region.group


def start_all_reduce(tensor: Tensor, region: "TensorRegion") -> Message:
    """Sum `tensor` over the group, in place: by copies (`exchange.py`) where two devices can, else by the backend."""
    assert tensor.is_contiguous()
    return _by_copies(tensor, tensor, region) or _by_backend(tensor, region)


def start_sum(tensor: Tensor, region: "TensorRegion") -> Message:
    """The sum of `tensor` over the group, which may have other readers and stays as it is."""
    if region.exchange:
        whole = tensor.contiguous()
        message = _by_copies(whole, torch.empty_like(whole), region)
        if message:
            return message
    return _by_backend(tensor.clone(memory_format=torch.contiguous_format), region)


def _by_copies(tensor: Tensor, out: Tensor, region: "TensorRegion") -> Message | None:
    arrival = region.exchange.start(tensor, out) if region.exchange else None
    return arrival and Message(arrival, out, lambda summed: summed)


def _by_backend(tensor: Tensor, region: "TensorRegion") -> Message:
    return Message(dist.all_reduce(tensor, group=group_of(region), async_op=True), tensor, lambda summed: summed)


def start_gather(tensor: Tensor, region: "TensorRegion") -> Message:
    """The tensors of all ranks, stacked: [size, ...]."""
    stacked = tensor.new_empty((region.size, *tensor.shape))
    work = _all_gather(stacked.flatten(0, 1), tensor.contiguous(), group=group_of(region), async_op=True)
    return Message(work, stacked, lambda shares: shares)


def start_gather_sequence(share: Tensor, region: "TensorRegion") -> Message:
    """[B, S / size, H] of each rank, joined to [B, S, H] in the order of the ranks."""
    return replace(start_gather(share, region), unpack=lambda shares: shares.transpose(0, 1).flatten(1, 2))


def start_reduce_scatter_sequence(partial: Tensor, region: "TensorRegion") -> Message:
    """The sum over the group of [B, S, H], of which this rank gets its share [B, S / size, H]."""
    shares = partial.unflatten(1, (region.size, -1)).transpose(0, 1).contiguous()
    mine = torch.empty_like(shares[0])
    work = _reduce_scatter(mine, shares.flatten(0, 1), group=group_of(region), async_op=True)
    return Message(work, mine, lambda summed: summed)


# torch 2.13 renamed these two; the old names go when 2.13 is the oldest torch we run on.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
