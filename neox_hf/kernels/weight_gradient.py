"""A linear's weight gradient, added up by the product that makes it.

    total [out, in] += gradient [T, out]^T x [T, in]

autograd has the product write a gradient in the weight's dtype, casts it, and adds it to what micro-batches before have
left: five passes over memory the size of the weights, where the product alone needs one. `GradientSum` is what a weight
carries, as its attribute, where a training engine wants its gradients summed this way; `linear` looks for it.
"""

import functools
from typing import Any, Protocol

import torch
from torch import Tensor, nn

ATTRIBUTE = "gradient_sum"


class GradientSum(Protocol):
    """Takes the products that are a weight's gradient."""

    def add_product(self, weight: nn.Parameter, gradient: Tensor, x: Tensor) -> None:
        """Add gradient [T, out]^T x [T, in]."""


class SumInGrad:
    """Sums in `weight.grad`, of the dtype that `weight.grad_dtype` says, hooks called as autograd calls them."""

    def __init__(self) -> None:
        self._calls_hooks = not autograd_calls_hooks_without_gradient()

    def add_product(self, weight: nn.Parameter, gradient: Tensor, x: Tensor) -> None:
        if weight.grad is None:
            weight.grad = product(gradient, x, weight.grad_dtype or weight.dtype)
        else:
            add_product_(weight.grad, gradient, x)
        for hook in tuple((weight._post_accumulate_grad_hooks or {}).values()) if self._calls_hooks else ():
            hook(weight)


@functools.cache
def autograd_calls_hooks_without_gradient() -> bool:
    """Whether this torch runs a leaf's post-accumulate hooks where a function gave it no gradient: 2.13 does."""
    called: list[bool] = []
    leaf = torch.zeros(1, requires_grad=True)
    leaf.register_post_accumulate_grad_hook(lambda _: called.append(True))
    _GiveNothing.apply(leaf, torch.zeros(1, requires_grad=True)).backward()
    return bool(called)


class _GiveNothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, other: Tensor) -> Tensor:
        return other.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def sum_of(weight: Tensor) -> GradientSum | None:
    """What sums the gradients of `weight`, or None: autograd does, as it must where a hook is to see each gradient."""
    return None if weight._backward_hooks else getattr(weight, ATTRIBUTE, None)


def sum_in(weight: nn.Parameter, total: GradientSum) -> None:
    """Have the gradients of `weight` summed by `total` from now on, wherever it is a linear's."""
    setattr(weight, ATTRIBUTE, total)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a^T b [V, H] in `dtype`, at least as wide as theirs, for a [C, V] and b [C, H]."""
    total = torch.empty(a.shape[1], b.shape[1], dtype=dtype, device=a.device)
    add_product_(total, a, b, keep=False)
    return total


def add_product_(total: Tensor, a: Tensor, b: Tensor, *, keep: bool = True) -> None:
    """total [V, H] += a^T b for a [C, V] and b [C, H], summed in the dtype of `total`, at least as wide as theirs.

    keep: whether there is something in `total` yet.
    """
    beta = 1 if keep else 0
    if total.dtype == a.dtype:
        total.addmm_(a.t(), b, beta=beta)
    elif total.is_cuda:
        torch.addmm(total, a.t(), b, beta=beta, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.t().to(total.dtype), b.to(total.dtype), beta=beta)
