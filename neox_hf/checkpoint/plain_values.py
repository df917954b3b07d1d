"""Values that JSON alone would change: tuples, and tensors without dimensions. They are marked and come back equal."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from neox_hf.errors import CheckpointError


def encode_value(value: Any, where: str) -> Any:
    """JSON for a plain value, a tuple or list of such, or a 0-dimensional tensor. `where` names it in the error.

    Raises:
        CheckpointError: it is something else, which only pickle could save.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex():
        return {"tensor": dtype_name(value.dtype), "value": value.item()}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [encode_value(item, where) for item in value]}
    raise CheckpointError(f"the optimizer's {where} is a {type(value).__name__}, which cannot be saved without pickle")


def decode_value(value: Any, device: torch.device | None = None) -> Any:
    """What `encode_value` was given; tensors on `device`."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return torch.tensor(value["value"], dtype=getattr(torch, value["tensor"]), device=device)
    kind, items = next(iter(value.items()))
    decoded = [decode_value(item, device) for item in items]
    return tuple(decoded) if kind == "tuple" else decoded


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
