"""All-reduces between two devices of one host in which no multiprocessor takes part: each rank copies its summand into
the other's memory, and adds what has come to its own.

NCCL's reductions occupy multiprocessors. A product that is to hide one occupies all of them, with an equal share of the
work for each, so those that NCCL has taken do theirs when it is through: the product takes as much longer as the
message does, and nothing is hidden (pytorch/pytorch#143988). Copy engines have no other work. The sum of two is the
same numbers: rounded once, on both ranks alike. And whoever has more to add reads both summands, not their sum.
"""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from neox_hf.parallel.pair import Pair
from neox_hf.parallel.peer_memory import PeerMemory, room_for

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


class Exchange:
    """The sums of `pair`. Both ranks start the same, in one order, and wait for those that are under way before they
    launch a graph that holds others."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._idle: dict[int, deque[PeerMemory]] = {}

    @property
    def copies(self) -> bool:
        """Whether it does: not where the devices have turned out to be strangers."""
        return self._pair.reaches

    def start(self, tensor: Tensor, out: Tensor | None = None, beside: Tensor | None = None) -> Arrival | None:
        """Send `tensor`, contiguous, which stays as it is until the other's is awaited, and so `beside`, which is to be
        small. out, beside: of `Arrival`. None, on both ranks, where NCCL is to do it."""
        size = tensor.numel() * tensor.element_size()
        fits = beside is None or beside.numel() * beside.element_size() <= BESIDE_BYTES
        if size < LEAST_BYTES or not fits or not self.copies:
            return None
        room = room_for(size) + BESIDE_BYTES
        idle = self._idle.setdefault(room, deque())
        place = idle.popleft() if idle else self._new_place(room, tensor.device)
        if place is None:
            return None
        with self._pair.lane.behind_current():
            place.exchange(*_present(tensor, beside))
        return Arrival(tensor, out, beside, place, self._pair.lane.mark(), idle.append)

    def _new_place(self, size: int, device: torch.device) -> PeerMemory | None:
        return None if is_capturing() else self._pair.new_place(size, device)


def _present(tensor: Tensor, beside: Tensor | None) -> tuple[Tensor, ...]:
    return (tensor,) if beside is None else (tensor, beside)


def is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
