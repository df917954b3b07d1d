"""Memory on two devices of one host, each open to the other, and the signals that go with it.

What is sent is copied by a copy engine. Signals are kernels of one small block; a rank waits for them in its stream, so
nothing here waits for a device, and all of it can be part of a CUDA graph: each use leaves the signals as it found
them.
"""

import ctypes
import math
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory

PATIENCE = timedelta(minutes=30)
"""After which a signal that does not come ends the process, as the backend's messages do; of TrainingArguments'
`ddp_timeout` where none is given."""

NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"

ALIGNMENT = 256
"""Bytes of whose multiples each tensor of a message begins at one."""

NATIVE_ATOMICS = 3
"""CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED of CUDA's driver."""


class PeerMemory:
    """Room for one message of up to `size` bytes in either direction, for two ranks that then `meet`.

    Raises:
        RuntimeError: there is no memory left.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        with _without_multicast():
            self._mine = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
        torch.cuda.synchronize(device)  # its signals are cleared, before the other rank gives one

    def meet(self, group: dist.ProcessGroup, number: int, patience: timedelta = PATIENCE) -> None:
        """Open it to the other rank of the group, and the other's to this one. Both do, at once.

        number: of those that this group has made, so that signals of no two are confused. patience: with a signal.

        Raises:
            RuntimeError: the devices cannot reach each other's memory.
        """
        with _without_multicast():
            self._handle = symmetric_memory.rendezvous(self._mine, group)
        self._peer = 1 - self._handle.rank
        self._theirs = self._handle.get_buffer(self._peer, tuple(self._mine.shape), torch.uint8)
        self._arrived, self._read = 2 * number, 2 * number + 1
        self._patience_ms = math.ceil(patience.total_seconds() * 1000)
        self._signal(self._read)

    def exchange(self, *tensors: Tensor) -> None:
        """Send `tensors`, and wait for the other's; on the current stream."""
        self.send(*tensors)
        self.expect()

    def send(self, *tensors: Tensor) -> None:
        """When the other has released what it got before; on the current stream."""
        self._await(self._read)
        for place, tensor in zip(_laid_out(tensors, self._theirs), tensors, strict=True):
            place.copy_(tensor)
        self._signal(self._arrived)

    def expect(self) -> None:
        """Wait for what the other sends; on the current stream."""
        self._await(self._arrived)

    def came(self, *like: Tensor) -> list[Tensor]:
        """What the other has sent, in the shapes and dtypes of `like`; until `release`."""
        return _laid_out(like, self._mine)

    def summands(self, *tensors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each of `tensors` and what came for it, in the order of the ranks; until `release`."""
        pairs = zip(self.came(*tensors), tensors, strict=True)
        return [(came, tensor) if self._peer == 0 else (tensor, came) for came, tensor in pairs]

    def release(self) -> None:
        """What came has been read: the other may send again. On the current stream."""
        self._signal(self._read)

    def _signal(self, what: int) -> None:
        self._handle.put_signal(self._peer, what, self._patience_ms)

    def _await(self, what: int) -> None:
        self._handle.wait_signal(self._peer, what, self._patience_ms)


@contextmanager
def _without_multicast() -> Iterator[None]:
    """Two devices need none, and where the driver offers it without being able to, torch waits for it forever
    (pytorch/pytorch#195596)."""
    before = os.environ.get(NO_MULTICAST)
    os.environ[NO_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[NO_MULTICAST]
        else:
            os.environ[NO_MULTICAST] = before


def room_for(size: int) -> int:
    """Bytes to reserve for a message of `size`: a power of two, so that batches of many lengths take room for a few."""
    return 1 << (size - 1).bit_length()


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Of a message of `tensors`."""
    return sum(-(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT for tensor in tensors)


def _laid_out(tensors: Sequence[Tensor], memory: Tensor) -> list[Tensor]:
    """Views of `memory`, one behind the other, in the shapes and dtypes of `tensors`."""
    views, begin = [], 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        views.append(memory[begin : begin + size].view(tensor.dtype).view(tensor.shape))
        begin += bytes_of([tensor])
    return views


def are_near(group: dist.ProcessGroup | None, device: torch.device) -> bool:
    """Whether this rank's device and the other's are of one host and linked by NVLink: it offers atomics on the other's
    memory, which signals are; PCI Express does not. Both ranks ask at once, and each may get an answer of its own."""
    mine = (socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid))
    both = [None, None]
    dist.all_gather_object(both, mine, group=group)
    (theirs,) = [other for other in both if other != mine] or [mine]
    visible = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    if theirs[0] != mine[0] or theirs[1] not in visible:
        return False
    return _has_native_atomics(visible[mine[1]], visible[theirs[1]])


def _has_native_atomics(device: int, other: int) -> bool:
    """No, too, for a device and itself, and where no CUDA driver is."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    has, handles = ctypes.c_int(0), (ctypes.c_int(0), ctypes.c_int(0))
    asked = [
        driver.cuDeviceGet(ctypes.byref(handle), index) for handle, index in zip(handles, (device, other), strict=True)
    ]
    asked.append(driver.cuDeviceGetP2PAttribute(ctypes.byref(has), NATIVE_ATOMICS, *handles))
    return not any(asked) and bool(has.value)
