"""All-reduces between two devices of one host in which no multiprocessor takes part: each rank copies its summand into
the other's memory, and adds what has come to its own.

NCCL's reductions occupy multiprocessors. A product that is to hide one occupies all of them, with an equal share of the
work for each, so those that NCCL has taken do theirs when it is through: the product takes as much longer as the
message does, and nothing is hidden (pytorch/pytorch#143988). Copy engines have no other work. The sum of two is the
same numbers: rounded once, on both ranks alike.
"""

import logging
import socket
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from neox_hf.parallel.peer_memory import PeerMemory

logger = logging.getLogger(__name__)

LEAST_BYTES = 2**20
"""Of a message: below, NCCL is done as soon."""

ALIGNMENT = 16
"""Bytes that a message is a multiple of."""


class Arrival:
    """What is under way. `wait()` adds what the other rank has sent to `tensor`, into `out`."""

    def __init__(
        self,
        tensor: Tensor,
        out: Tensor,
        place: PeerMemory,
        there: torch.Event,
        done: Callable[[PeerMemory], None],
    ) -> None:
        self._tensor, self._out, self._place, self._there, self._done = tensor, out, place, there, done

    def wait(self) -> None:
        """The device waits, not this thread."""
        self._there.wait()
        self._place.add(self._tensor, self._out)
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
    """The messages of a tensor group of two. Both ranks start the same ones, in one order, and wait for those that are
    under way before they launch a graph that holds others.

    make_place, make_lane: what stands for the devices, in tests.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        make_place: Callable[..., PeerMemory] = PeerMemory,
        make_lane: Callable[[], Lane] = Lane,
    ) -> None:
        self._group, self._make_place, self._make_lane = group, make_place, make_lane
        self._idle: dict[int, deque[PeerMemory]] = {}
        self._made = 0
        self._lane: Lane | None = None
        self._possible: bool | None = None

    def start(self, tensor: Tensor, out: Tensor) -> Arrival | None:
        """out = the sum over both ranks of `tensor`, both contiguous; `out` may be `tensor`. None, on both ranks, where
        NCCL is to do it."""
        size = tensor.numel() * tensor.element_size()
        if size < LEAST_BYTES or size % ALIGNMENT or self._possible is False:
            return None
        idle = self._idle.setdefault(size, deque())
        place = idle.popleft() if idle else self._new_place(size, tensor.device)
        if place is None:
            return None
        with self._lane.behind_current():
            place.exchange(tensor)
        return Arrival(tensor, out, place, self._lane.mark(), idle.append)

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
        place, reason = None, "its ranks are on two hosts"
        if self._on_one_host():
            reason = "the other rank was refused"
            try:
                place = self._make_place(size, self._group_or_world(), device, 0)
            except RuntimeError as error:
                reason = error
        got = torch.tensor(place is not None, dtype=torch.int32, device=device)
        dist.all_reduce(got, dist.ReduceOp.MIN, group=self._group)
        self._possible = bool(got)
        if not self._possible:
            logger.warning(
                "parallel.messages = copies: this tensor group's devices do not reach each other's memory (%s); "
                "messages go through NCCL",
                reason,
            )
            return None
        self._made, self._lane = 1, self._make_lane()
        return place

    def _on_one_host(self) -> bool:
        hosts = [None, None]
        dist.all_gather_object(hosts, socket.gethostname(), group=self._group)
        return hosts[0] == hosts[1]

    def _group_or_world(self) -> dist.ProcessGroup:
        return dist.group.WORLD if self._group is None else self._group


def is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
