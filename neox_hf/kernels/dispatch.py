"""The one place that chooses how an op is computed.

An `Op` holds the implementations of one operation; the choice `auto | triton | torch` travels to it as an argument.
Nothing is remembered between calls.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

Backend = Literal["auto", "triton", "torch"]
BACKENDS: tuple[str, ...] = get_args(Backend)


@dataclass(frozen=True)
class Op:
    """One operation: its plain-torch reference and, where there is one, its Triton kernel (same signature)."""

    name: str
    torch: Callable[..., Any]
    triton: Callable[..., Any] | None = None

    def choose(self, backend: str, device: torch.device) -> Callable[..., Any]:
        """The implementation for `backend` on `device`. `auto` takes Triton on CUDA wherever it exists.

        Raises:
            ValueError: the backend is unknown, or `triton` was asked for where it cannot run.
        """
        if backend == "torch":
            return self.torch
        if backend == "auto":
            return self.triton if self.triton is not None and device.type == "cuda" else self.torch
        if backend != "triton":
            raise ValueError(f"kernels={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
        if self.triton is None:
            raise ValueError(
                f"kernels='triton', but no Triton kernel is registered for {self.name}; "
                "kernels='auto' falls back to torch where there is none"
            )
        if device.type != "cuda":
            raise ValueError(
                f"kernels='triton', but {self.name} was given a tensor on {device}; "
                "Triton kernels run on CUDA: move the model there, or use kernels='auto'"
            )
        return self.triton


def describe_choice(ops: Iterable[Op], backend: str) -> str:
    """One line for the log: what `backend` comes to for each op."""
    chosen = {op.name: "triton on CUDA" if backend != "torch" and op.triton is not None else "torch" for op in ops}
    return f"kernels={backend}: " + ", ".join(f"{name} {implementation}" for name, implementation in chosen.items())
