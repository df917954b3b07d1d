"""Tensors that travel, one at a time, from the ranks that hold parts of them to the one rank that writes them."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from neox_hf.parallel.topology import Topology

Shape = tuple[int, ...]


class Exchange:
    """Messages between the ranks along one axis of a topology. Every rank of the axis constructs it.

    Args:
        axis: `tensor`, `data` or `pipeline`.
        device: where messages lie while they travel; the accelerator under NCCL.
    """

    def __init__(self, topology: Topology, axis: str, device: torch.device) -> None:
        self.rank: int = getattr(topology, f"{axis}_rank")
        self.size: int = getattr(topology, axis)
        self.device = device
        self._group = getattr(topology.groups, axis)
        self._members = next(ranks for ranks in topology.axis_ranks(axis) if topology.rank in ranks)
        if self.size > 1:
            # NCCL wants a group's first message to be one in which all of it takes part.
            dist.all_reduce(torch.zeros(1, device=device), group=self._group)

    def gather_objects(self, mine: object) -> list:
        """What every rank of the axis gave, by its place on the axis."""
        if self.size == 1:
            return [mine]
        answers: list[object] = [None] * self.size
        dist.all_gather_object(answers, mine, group=self._group)
        return answers

    def collect(self, owner: int, mine: Tensor | None, shapes: list[Shape | None], dtype: torch.dtype) -> list[Tensor]:
        """Bring parts of a tensor to `owner`.

        mine: this rank's part. shapes: of every rank's part; None where there is none. Every rank that has a part, and
            the owner, must call; others may.

        Returns:
            On the owner the parts where they arrived, by place on the axis (an empty tensor where there is none, and
            the owner's own as it was given); elsewhere an empty list.
        """
        if self.rank != owner:
            if mine is not None:
                self._carry_out([dist.P2POp(dist.isend, self._ready(mine), self._members[owner], self._group)])
            return []
        buffers = {
            rank: torch.empty(shape, dtype=dtype, device=self.device)
            for rank, shape in enumerate(shapes)
            if shape is not None and rank != owner
        }
        self._carry_out(
            [dist.P2POp(dist.irecv, buffer, self._members[rank], self._group) for rank, buffer in buffers.items()]
        )
        nothing = torch.empty(0, dtype=dtype)
        parts = [buffers.get(rank, nothing) for rank in range(self.size)]
        if mine is not None:
            parts[owner] = mine
        return parts

    def join(
        self,
        owner: int,
        mine: Tensor,
        ranges: list[tuple[int, int]],
        shape: Shape,
        dtype: torch.dtype,
        empty: Callable[..., Tensor] = torch.empty,
    ) -> Tensor | None:
        """Put a tensor together of which every rank of the axis has some consecutive elements. Every rank calls.

        mine: this rank's elements, flat. ranges: first element and count of every rank's. empty: gives the memory that
            it is put together in.

        Returns:
            On the owner the tensor, of `shape`; None elsewhere.
        """
        parts = self.collect(owner, mine if mine.numel() else None, [(n,) if n else None for _, n in ranges], dtype)
        if not parts:
            return None
        whole = empty(shape, dtype=dtype)
        for (start, numel), part in zip(ranges, parts, strict=True):
            whole.view(-1).narrow(0, start, numel).copy_(part)
        return whole

    def _ready(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device).contiguous()

    def _carry_out(self, operations: list[dist.P2POp]) -> None:
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
