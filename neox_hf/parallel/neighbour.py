"""What two neighbouring pipeline stages send each other, by copies: activations one way, gradients the other.

NCCL's messages between two ranks hold up who sends until the other receives. A copy leaves in a lane of its own, when
what was sent before has been taken, and the sender computes on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from neox_hf.parallel.pair import Pair
from neox_hf.parallel.peer_memory import PeerMemory, bytes_of


class Neighbour:
    """The other stage. Each sends what the other receives, in one order; a message is tensors of known shapes."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._place: PeerMemory | None = None
        self._room = 0

    def make_room(self, size: int, device: torch.device) -> None:
        """Have messages of up to `size` bytes carried, if the devices can. Both ranks ask at once."""
        if size <= self._room or not self._pair.reaches:
            return
        self._place = self._pair.new_place(size, device)
        self._room = size if self._place else 0

    @property
    def has_room(self) -> bool:
        return self._room > 0

    def carries(self, tensors: Sequence[Tensor]) -> bool:
        """Whether there is room for these. The other rank says the same of tensors like them."""
        return 0 < bytes_of(tensors) <= self._room

    def send(self, tensors: Sequence[Tensor]) -> None:
        """A copy of each, which may be overwritten as soon as the current stream goes on."""
        own = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors]
        with self._pair.lane.behind_current():
            self._place.send(*own)
        for tensor in own:
            self._pair.lane.keep(tensor)

    def receive(self, like: Sequence[Tensor]) -> list[Tensor]:
        """The next message; the current stream waits for it. like: tensors of its shapes and dtypes."""
        self._place.expect()
        found = [came.clone() for came in self._place.came(*like)]
        self._place.release()
        return found
