"""Two ranks on two devices; or, on a host with one, on that."""

import os

import torch
import torch.distributed as dist

from neox_hf.parallel.pair import Pair

SHARED_DEVICE = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
"""torch's variable: two ranks may have their memory on one device."""


def device_of(rank: int) -> torch.device:
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def pair_in(group: dist.ProcessGroup | None) -> Pair:
    """It would leave one device for both to NCCL, which refuses that."""
    if torch.cuda.device_count() > 1:
        return Pair(group)
    os.environ[SHARED_DEVICE] = "1"
    return Pair(group, near=lambda group, device: True)
