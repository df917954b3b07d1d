"""The one place that chooses how an op is computed.

An `Op` holds the implementations of one operation; the choice `auto | triton | torch` travels to it as an argument.
Nothing is remembered between calls.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from neox_hf.kernels.language import runs_on

Backend = Literal["auto", "triton", "torch"]
BACKENDS: tuple[str, ...] = get_args(Backend)

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What kernels compute on, with statistics in fp32; more precision than that only the references have."""


@dataclass(frozen=True)
class Op:
    """One operation: its plain-torch reference and, where there is one, its Triton kernel (same signature)."""

    name: str
    torch: Callable[..., Any]
    triton: Callable[..., Any] | None = None

    def has_kernel_for(self, backend: str, x: Tensor) -> bool:
        """Whether `choose` gives the Triton kernel, for who would prepare its inputs otherwise."""
        return self.choose(backend, x) is self.triton

    def choose(self, backend: str, x: Tensor) -> Callable[..., Any]:
        """The implementation for `backend` on tensors like `x`. `auto` takes Triton on CUDA wherever it exists.

        Raises:
            ValueError: the backend is unknown, or `triton` was asked for where it cannot run.
        """
        if backend == "torch":
            return self.torch
        if backend == "auto":
            fits = self.triton is not None and x.device.type == "cuda" and x.dtype in KERNEL_DTYPES
            return self.triton if fits and runs_on(x.device) else self.torch
        if backend != "triton":
            raise ValueError(f"kernels={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
        if self.triton is None:
            raise ValueError(
                f"kernels='triton', but no Triton kernel is registered for {self.name}; "
                "kernels='auto' falls back to torch where there is none"
            )
        if not runs_on(x.device):
            raise ValueError(
                f"kernels='triton', but {self.name} was given a tensor on {x.device}; "
                "Triton kernels run on CUDA: move the model there, or use kernels='auto'"
            )
        if x.dtype not in KERNEL_DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in KERNEL_DTYPES)
            raise ValueError(
                f"kernels='triton', but {self.name} was given {x.dtype}; its kernel takes {names}: "
                "cast the model, or use kernels='auto'"
            )
        return self.triton


def describe_choice(ops: Iterable[Op], backend: str) -> str:
    """One line for the log: what `backend` comes to for each op."""
    chosen = {op.name: "triton on CUDA" if backend != "torch" and op.triton is not None else "torch" for op in ops}
    return f"kernels={backend}: " + ", ".join(f"{name} {implementation}" for name, implementation in chosen.items())
