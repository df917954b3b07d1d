"""What two neighbouring pipeline stages send each other, by copies: activations one way, gradients the other.

NCCL's messages between two ranks hold up who sends until the other receives. A copy leaves in a lane of its own, when
what was sent before has been taken, and the sender computes on.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from neox_hf.parallel.pair import Pair
from neox_hf.parallel.peer_memory import PeerMemory, bytes_of, room_for

AHEAD = 2
"""Messages that have been sent and not taken, at most, before the next send waits for the first to leave."""


class Neighbour:
    """The other stage. Each sends what the other receives, in one order; a message is tensors of known shapes."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._place: PeerMemory | None = None
        self._room = 0
        self._leaving: deque[tuple[list[Tensor], torch.Event]] = deque()

    def make_room(self, size: int, device: torch.device) -> None:
        """Have messages of up to `size` bytes carried, if the devices can. Both ranks ask at once."""
        if size <= self._room or not self._pair.reaches:
            return
        room = room_for(size)
        place = self._pair.new_place(room, device)
        if place is not None:
            self._place, self._room = place, room

    @property
    def has_room(self) -> bool:
        return self._room > 0

    def carries(self, tensors: Sequence[Tensor]) -> bool:
        """Whether there is room for these. The other rank says the same of tensors like them."""
        return 0 < bytes_of(tensors) <= self._room

    def send(self, tensors: Sequence[Tensor]) -> None:
        """A copy of each, which may be overwritten as soon as the current stream goes on."""
        own = self._copies(tensors)
        with self._pair.lane.behind_current():
            self._place.send(*own)
        self._leaving.append((own, self._pair.lane.mark()))

    def _copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """In memory of those that have left, if they were alike."""
        own: list[Tensor] = []
        if len(self._leaving) == AHEAD:
            own, left = self._leaving.popleft()
            left.wait()
        if [(each.shape, each.dtype) for each in own] != [(each.shape, each.dtype) for each in tensors]:
            own = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
        for copy, tensor in zip(own, tensors, strict=True):
            copy.copy_(tensor.detach())
        return own

    def receive(self, like: Sequence[Tensor]) -> list[Tensor]:
        """The next message; the current stream waits for it. like: tensors of its shapes and dtypes."""
        self._place.expect()
        found = [came.clone() for came in self._place.came(*like)]
        self._place.release()
        return found
