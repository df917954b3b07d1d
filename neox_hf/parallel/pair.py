"""Two ranks whose devices may reach each other's memory: whether they do, the memory they have opened to each other so
far, and a stream for what they send.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

from neox_hf.parallel.peer_memory import PeerMemory, are_near

logger = logging.getLogger(__name__)


class Lane:
    """A stream of copies, beside the one that computes. Its signals go first: they are small, and products are not."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream(priority=-1)

    def behind_current(self) -> AbstractContextManager[None]:
        """What is asked for in this context runs in the lane, behind all that was asked for before."""
        self.stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.stream)

    def mark(self) -> torch.Event:
        """An event behind all that the lane has been asked for."""
        return self.stream.record_event()

    def keep(self, tensor: torch.Tensor) -> None:
        """Have the memory of `tensor`, of which nobody may be left to think, kept until the lane has read it."""
        tensor.record_stream(self.stream)


class Pair:
    """Both ranks ask for the same places, in one order; none is asked for while a graph is captured, which can wait for
    no other process.

    group: of the two; None is the whole world. make_place, make_lane, near: what stands for the devices, in tests.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        make_place: Callable[..., PeerMemory] = PeerMemory,
        make_lane: Callable[[], Lane] = Lane,
        near: Callable[..., bool] = are_near,
    ) -> None:
        self._group, self._make_place, self._make_lane, self._near = group, make_place, make_lane, near
        self._reaches: bool | None = None
        self._lane: Lane | None = None
        self.made = 0

    @property
    def reaches(self) -> bool:
        """Whether they do: not where the devices have turned out to be strangers."""
        return self._reaches is not False

    @property
    def lane(self) -> Lane:
        """Of a pair that has a place."""
        assert self._lane is not None
        return self._lane

    def new_place(self, size: int, device: torch.device) -> PeerMemory | None:
        """Room for messages of up to `size` bytes; None, on both ranks, where the devices are strangers."""
        if self._reaches is None:
            return self._first_place(size, device)
        place = self._make_place(size, self._group_or_world(), device, self.made) if self._reaches else None
        self.made += self._reaches
        return place

    def _first_place(self, size: int, device: torch.device) -> PeerMemory | None:
        """One that both ranks have got, or none on either."""
        place = None
        if self._agree(self._near(self._group, device), device):
            try:
                place = self._make_place(size, self._group_or_world(), device, 0)
            except RuntimeError as error:
                logger.warning("Symmetric memory of two ranks: %s", error)
        self._reaches = self._agree(place is not None, device)
        if not self._reaches:
            logger.info("The two devices of this group do not share memory by NVLink: messages go through NCCL")
            return None
        self.made, self._lane = 1, self._make_lane()
        return place

    def _agree(self, mine: bool, device: torch.device) -> bool:
        """Whether both ranks say so."""
        both = torch.tensor(mine, dtype=torch.int32, device=device)
        dist.all_reduce(both, dist.ReduceOp.MIN, group=self._group)
        return bool(both)

    def _group_or_world(self) -> dist.ProcessGroup:
        return dist.group.WORLD if self._group is None else self._group
