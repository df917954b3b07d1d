"""Triton, or a stand-in on systems it does not exist for, where kernels can be defined but not launched.

Nothing is decided here: without CUDA `auto` takes the torch references, and whoever asks for `triton` is told.
"""

import os
from importlib.util import find_spec
from typing import Any

import torch

HAS_TRITON = find_spec("triton") is not None


class _Absent:
    """Takes the place of a module: any attribute of it, used as a decorator or in an annotation, is this again."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> "_Absent":
        return self


if HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.errors import TritonError

    LAUNCH_ERRORS: tuple[type[Exception], ...] = (TritonError, RuntimeError)
else:
    triton = tl = _Absent()
    LAUNCH_ERRORS = (RuntimeError,)
"""What a kernel that cannot be compiled, or asks for more than a multiprocessor has, fails with."""


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def runs_on(device: torch.device) -> bool:
    """Whether a kernel can be launched on tensors of `device`; on `meta` only shapes are asked for."""
    return HAS_TRITON and (device.type in ("cuda", "meta") or (device.type == "cpu" and interprets()))
