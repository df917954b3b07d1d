"""All-reduces between two devices of one host in which no multiprocessor takes part: each rank copies its summand into
the other's memory, and adds what has come to its own.

NCCL's reductions occupy multiprocessors. A product that is to hide one occupies all of them, with an equal share of the
work for each, so those that NCCL has taken do theirs when it is through: the product takes as much longer as the
message does, and nothing is hidden (pytorch/pytorch#143988). Copy engines have no other work. The sum of two is the
same numbers: rounded once, on both ranks alike. And whoever has more to add reads both summands, not their sum.
"""

import logging
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from neox_hf.parallel.peer_memory import PeerMemory, are_near

logger = logging.getLogger(__name__)

LEAST_BYTES = 2**20
"""Of a message: NCCL is done with smaller ones sooner. But beside a product it is not, and a smaller one may travel in
a larger one."""

BESIDE_BYTES = 2**20
"""Of what travels in another tensor's message, at most."""


class Arrival:
    """What is under way: `tensor`, and that of the other rank. It is awaited once, by either method; the device waits,
    not this thread.

    out: where `wait` leaves the sum, which may be `tensor`; None is a tensor of its own.
    beside: has travelled in the same message, and is its own sum once this has been awaited.
    """

    def __init__(
        self,
        tensor: Tensor,
        out: Tensor | None,
        beside: Tensor | None,
        place: PeerMemory,
        there: torch.Event,
        done: Callable[[PeerMemory], None],
    ) -> None:
        self._tensor, self._out, self._beside = tensor, out, beside
        self._place, self._there, self._done = place, there, done

    def wait(self) -> Tensor:
        """The sum."""
        out = torch.empty_like(self._tensor) if self._out is None else self._out
        self.hand_to(lambda first, second: torch.add(first, second, out=out))
        return out

    def hand_to(self, use: Callable[[Tensor, Tensor], object]) -> None:
        """Have `use` read both summands, in the order of the ranks. They are not its to keep."""
        self._there.wait()
        summands, *of_beside = self._place.summands(*_present(self._tensor, self._beside))
        use(*summands)
        for first, second in of_beside:
            torch.add(first, second, out=self._beside)
        self._place.release()
        self._done(self._place)


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


class Exchange:
    """The messages of a group of two. Both ranks start the same ones, in one order, and wait for those that are
    under way before they launch a graph that holds others.

    make_place, make_lane, near: what stands for the devices, in tests.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        make_place: Callable[..., PeerMemory] = PeerMemory,
        make_lane: Callable[[], Lane] = Lane,
        near: Callable[..., bool] = are_near,
    ) -> None:
        self._group, self._make_place, self._make_lane, self._near = group, make_place, make_lane, near
        self._idle: dict[int, deque[PeerMemory]] = {}
        self._made = 0
        self._lane: Lane | None = None
        self._possible: bool | None = None

    @property
    def copies(self) -> bool:
        """Whether it does: not where the devices have turned out to be strangers."""
        return self._possible is not False

    def start(self, tensor: Tensor, out: Tensor | None = None, beside: Tensor | None = None) -> Arrival | None:
        """Send `tensor`, contiguous, which stays as it is until the other's is awaited, and so `beside`, which is to be
        small. out, beside: of `Arrival`. None, on both ranks, where NCCL is to do it."""
        size = tensor.numel() * tensor.element_size()
        fits = beside is None or beside.numel() * beside.element_size() <= BESIDE_BYTES
        if size < LEAST_BYTES or not fits or self._possible is False:
            return None
        room = room_for(size)
        idle = self._idle.setdefault(room, deque())
        place = idle.popleft() if idle else self._new_place(room, tensor.device)
        if place is None:
            return None
        with self._lane.behind_current():
            place.exchange(*_present(tensor, beside))
        return Arrival(tensor, out, beside, place, self._lane.mark(), idle.append)

    def _new_place(self, size: int, device: torch.device) -> PeerMemory | None:
        """None while a graph is captured, which can wait for no other process, and where the devices are strangers."""
        if is_capturing():
            return None
        if self._possible is None:
            return self._first_place(size, device)
        place = self._make_place(size, self._group_or_world(), device, self._made)
        self._made += 1
        return place

    def _first_place(self, size: int, device: torch.device) -> PeerMemory | None:
        """One that both ranks have got, or none on either."""
        place = None
        if self._agree(self._near(self._group, device), device):
            try:
                place = self._make_place(size, self._group_or_world(), device, 0)
            except RuntimeError as error:
                logger.warning("Symmetric memory of two ranks: %s", error)
        self._possible = self._agree(place is not None, device)
        if not self._possible:
            logger.info("The two devices of this group do not share memory by NVLink: messages go through NCCL")
            return None
        self._made, self._lane = 1, self._make_lane()
        return place

    def _agree(self, mine: bool, device: torch.device) -> bool:
        """Whether both ranks say so."""
        both = torch.tensor(mine, dtype=torch.int32, device=device)
        dist.all_reduce(both, dist.ReduceOp.MIN, group=self._group)
        return bool(both)

    def _group_or_world(self) -> dist.ProcessGroup:
        return dist.group.WORLD if self._group is None else self._group


def room_for(size: int) -> int:
    """Bytes to reserve for a message: a power of two, so that batches of many lengths take memory for a few, and what
    may travel beside it."""
    return (1 << (size - 1).bit_length()) + BESIDE_BYTES


def _present(tensor: Tensor, beside: Tensor | None) -> tuple[Tensor, ...]:
    return (tensor,) if beside is None else (tensor, beside)


def is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
