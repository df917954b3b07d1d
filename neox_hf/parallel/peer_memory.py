"""Memory on two devices of one host, each open to the other, and the signals that go with it.

What is sent is copied by a copy engine. Signals are kernels of one small block; a rank waits for them in its stream, so
nothing here waits for a device, and all of it can be part of a CUDA graph: each use leaves the signals as it found
them.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory

PATIENCE_MS = 30 * 60 * 1000
"""After which a signal that does not come ends the process, as the backend's messages do: TrainingArguments'
`ddp_timeout`."""


class PeerMemory:
    """Room for one message of `size` bytes in either direction. Both ranks of the group make it at once.

    number: of those that this group has made, so that signals of no two are confused.

    Raises:
        RuntimeError: the devices cannot reach each other's memory.
    """

    def __init__(self, size: int, group: dist.ProcessGroup, device: torch.device, number: int) -> None:
        self._mine = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
        torch.cuda.synchronize(device)  # its signals are cleared, before the other rank gives one
        self._handle = symmetric_memory.rendezvous(self._mine, group)
        self._peer = 1 - self._handle.rank
        self._theirs = self._handle.get_buffer(self._peer, (size,), torch.uint8)
        self._arrived, self._read = 2 * number, 2 * number + 1
        self._signal(self._read)

    def exchange(self, tensor: Tensor) -> None:
        """Send `tensor` [size bytes], and wait for the other's; on the current stream."""
        self._await(self._read)
        self._theirs.view(tensor.dtype).copy_(tensor.flatten())
        self._signal(self._arrived)
        self._await(self._arrived)

    def add(self, tensor: Tensor, out: Tensor) -> None:
        """out = `tensor` + what came; then the other may send again. On the current stream."""
        torch.add(tensor.view(-1), self._mine.view(tensor.dtype), out=out.view(-1))
        self._signal(self._read)

    def _signal(self, what: int) -> None:
        self._handle.put_signal(self._peer, what, PATIENCE_MS)

    def _await(self, what: int) -> None:
        self._handle.wait_signal(self._peer, what, PATIENCE_MS)
