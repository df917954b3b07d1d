"""Autocast, for operations that it does not reach into: those with a backward pass of their own."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What a matrix product on `device` would round its operands to here; None where it would not."""
    # Asking about meta, which lays models out without memory, is an error. Nor may one ask whether a device has it at
    # all: torch 2.11 does not trace that.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context whose operations keep the dtypes they are given."""
    return torch.autocast(device.type, enabled=False) if autocast_dtype(device) is not None else nullcontext()
