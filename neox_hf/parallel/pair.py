"""Two ranks whose devices may reach each other's memory: whether they do, the memory they open to each other, and a
stream for what they send.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta

import torch
import torch.distributed as dist

from neox_hf.parallel.peer_memory import PATIENCE, PeerMemory, are_near

logger = logging.getLogger(__name__)


class Lane:
    """A stream of copies, beside the one that computes. Its signals go first: they are small, and products are not."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream(priority=-1)

    def behind_current(self) -> AbstractContextManager[None]:
        """What is asked for in this context runs in the lane, behind all that was asked for before."""
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def mark(self) -> torch.Event:
        """An event behind all that the lane has been asked for."""
        return self._stream.record_event()


class Pair:
    """Both ranks ask for the same places, in one order; none is asked for while a graph is captured, which can wait for
    no other process.

    group: of the two; None is the whole world. make_place, make_lane, near: what stands for the devices, in tests.
    patience: with a message that does not come.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        make_place: Callable[..., PeerMemory] = PeerMemory,
        make_lane: Callable[[], Lane] = Lane,
        near: Callable[..., bool] = are_near,
        *,
        patience: timedelta = PATIENCE,
    ) -> None:
        self._group, self._make_place, self._make_lane, self._near = group, make_place, make_lane, near
        self._patience = patience
        self._reaches: bool | None = None
        self._lane: Lane | None = None
        self.made = 0

    @property
    def reaches(self) -> bool:
        """Whether they do: not where the devices have turned out to be strangers, or to have no memory left."""
        return self._reaches is not False

    @property
    def lane(self) -> Lane:
        """Of a pair that has a place."""
        assert self._lane is not None
        return self._lane

    def new_place(self, size: int, device: torch.device) -> PeerMemory | None:
        """Room for messages of up to `size` bytes; None, on both ranks, where one of them could not have it. They ask
        for no more then."""
        if self._reaches is None:
            self._reaches = self._agree(self._near(self._group, device), device)
            self._lane = self._make_lane() if self._reaches else None
            if not self._reaches:
                logger.info("Two ranks whose devices do not share memory by NVLink: their messages go by the backend")
        if not self._reaches:
            return None
        place = self._open(size, device)
        self._reaches = place is not None
        return place

    def _open(self, size: int, device: torch.device) -> PeerMemory | None:
        """One that both ranks have got, or none on either: each step of it is one that both come to."""
        place = _unless_refused(lambda: self._reserve(size, device))
        if not self._agree(place is not None, device):
            return None
        place = _unless_refused(lambda: self._meet(place))
        return place if self._agree(place is not None, device) else None

    def _reserve(self, size: int, device: torch.device) -> PeerMemory:
        try:
            return self._make_place(size, device)
        except RuntimeError:
            torch.cuda.empty_cache()  # torch keeps memory that nothing uses, and this is not its own
            return self._make_place(size, device)

    def _meet(self, place: PeerMemory) -> PeerMemory:
        number, self.made = self.made, self.made + 1
        place.meet(dist.group.WORLD if self._group is None else self._group, number, self._patience)
        return place

    def _agree(self, mine: bool, device: torch.device) -> bool:
        """Whether both ranks say so."""
        both = torch.tensor(mine, dtype=torch.int32, device=device)
        dist.all_reduce(both, dist.ReduceOp.MIN, group=self._group)
        return bool(both)


def _unless_refused(what: Callable[[], PeerMemory]) -> PeerMemory | None:
    try:
        return what()
    except RuntimeError as error:
        logger.warning("Memory that two ranks open to each other: %s", error)
        return None
