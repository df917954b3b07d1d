"""Inputs of an op: the same numbers for every implementation, and in fp64 for the truth."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Random:
    """Random tensors of one dtype on one device, from a generator of their own: a broken capture cannot touch it."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def values(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.empty(shape, device=self.device, dtype=self.dtype)
        return values.normal_(std=scale, generator=self._generator)

    def leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.values(*shape, scale=scale).requires_grad_()

    def words(self, count: int, vocabulary: int) -> Tensor:
        return torch.randint(vocabulary, (count,), device=self.device, generator=self._generator)


@dataclass(frozen=True)
class Inputs:
    """arguments: of the op; those that require a gradient get one. gradients: what arrives at its outputs.

    made: the arguments are what another operation has made, which an op that works in place may change.
    """

    arguments: tuple[Any, ...]
    gradients: tuple[Tensor, ...]
    made: bool = False

    def in_fp64(self) -> "Inputs":
        """The same numbers; a dtype that gradients were to have is forgotten."""
        return Inputs(tuple(map(_wide, self.arguments)), tuple(map(_wide, self.gradients)), self.made)

    def forward(self, op: Callable[..., Any]) -> tuple[Tensor, ...]:
        return self._outputs(op, self._given())

    def forward_and_backward(self, op: Callable[..., Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Outputs, and the gradients of the arguments that want one."""
        given = self._given()
        outputs = self._outputs(op, given)
        wanted = [value for value in given if isinstance(value, Tensor) and value.requires_grad]
        gradients = [_as(g, output) for g, output in zip(self.gradients, outputs, strict=True)]
        return outputs, torch.autograd.grad(outputs, wanted, gradients)

    def _outputs(self, op: Callable[..., Any], given: tuple[Any, ...]) -> tuple[Tensor, ...]:
        outputs = op(*given)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def _given(self) -> tuple[Any, ...]:
        if not self.made:
            return self.arguments
        wants = [isinstance(value, Tensor) and value.requires_grad for value in self.arguments]
        return tuple(
            _Made.apply(value, value.detach()) if made else value
            for value, made in zip(self.arguments, wants, strict=True)
        )


class _Made(torch.autograd.Function):
    """What a layer before would have made, without the time that it would take."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, values: Tensor) -> Tensor:
        return values.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _wide(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _as(gradient: Tensor, output: Tensor) -> Tensor:
    """The gradient itself, which may be a view that the op knows, wherever it fits."""
    return gradient if gradient.dtype == output.dtype else gradient.to(output.dtype)
