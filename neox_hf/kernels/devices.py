"""The device that a kernel is launched on: found out once, or only where it is in question."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_NOTHING = nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; one where kernels are interpreted. Nothing waits for the device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def shared_kilobytes(device: torch.device) -> int:
    """KiB of shared memory that one program may have; where kernels are interpreted, a Hopper GPU's."""
    if device.type != "cuda":
        return 227
    properties = torch.cuda.get_device_properties(device)
    # What a kernel may ask for beyond the usual is told of NVIDIA's devices only.
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block) // 1024


def is_elsewhere(x: Tensor) -> bool:
    """Whether x is on a GPU that is not the current one, where Triton would launch its kernel all the same."""
    return x.is_cuda and x.get_device() != torch.cuda.current_device()


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """A context in which kernels are launched where x is. To change the device and back costs the host some us."""
    return torch.cuda.device_of(x) if is_elsewhere(x) else _NOTHING
