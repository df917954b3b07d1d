"""What a kernel is timed by: a pass of an op over inputs of its own, through the function that a run calls."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_hf.tuning.inputs import Random

Call = Callable[[], tuple[Tensor, ...]]
"""Launches the kernel; returns what it has written, in place or anew."""


@dataclass(frozen=True)
class Work:
    """A pass of an op. prepare: makes inputs of its own and returns the call; same random numbers, same results."""

    name: str
    prepare: Callable[[Random], Call]


Op = Callable[..., Tensor | tuple[Tensor, ...]]


def passes(name: str, op: Op, make: Callable[[Random], tuple[list[Tensor | None], list[Tensor]]]) -> Iterator[Work]:
    """The forward pass of `op`, then its backward pass alone. make: its arguments, and the gradients of its outputs."""

    def forward(random: Random) -> Call:
        arguments, _ = make(random)
        return lambda: _tuple(op(*arguments))

    def backward(random: Random) -> Call:
        arguments, gradients = make(random)
        leaves = [None if each is None else each.requires_grad_() for each in arguments]
        wanted = [leaf for leaf in leaves if leaf is not None]
        outputs = _tuple(op(*leaves))
        return lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)

    yield Work(f"{name}, forward", forward)
    yield Work(f"{name}, backward", backward)


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
