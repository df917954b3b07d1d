"""A linear's weight gradient, added up by the product that makes it.

    total [out, in] += gradient [T, out]^T x [T, in]

autograd has the product write a gradient in the weight's dtype, casts it, and adds it to what micro-batches before have
left: five passes over memory the size of the weights, where the product alone needs one. `GradientSum` is what a weight
carries, as its attribute, where a training engine wants its gradients summed this way; `linear` looks for it.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from neox_hf.kernels.late_tensor import LateTensor
from neox_hf.kernels.product import product_

ATTRIBUTE = "gradient_sum"

AddInto = Callable[[Tensor, bool], None]
"""Adds a product to a total [out, in], of whatever dtype; told False, it writes it there instead."""


class GradientSum(Protocol):
    """Takes the products that are a weight's gradient."""

    def add_product(self, weight: nn.Parameter, gradient: Tensor, x: Tensor, backend: str = "auto") -> None:
        """Add gradient [T, out]^T x [T, in]. backend: of `product_`."""

    def add_by(self, weight: nn.Parameter, add: AddInto) -> None:
        """Have `add` add a product that it knows the factors of."""

    def total(self, weight: nn.Parameter) -> Tensor:
        """Where gradients of `weight` are summed, in its shape. From now on it counts as having one."""

    def resume(self, weight: nn.Parameter, total: Tensor) -> bool:
        """See that they are summed in `total`, which `total()` has given in an earlier step; true if what lies there is
        of no account and has to be zeroed."""

    def tell(self, weight: nn.Parameter) -> None:
        """Tell those who wait for the gradient of `weight` that it is there, after it was added to the total."""


class SumInGrad:
    """Sums in `weight.grad`, of the dtype that `weight.grad_dtype` says, hooks called as autograd calls them."""

    def add_product(self, weight: nn.Parameter, gradient: Tensor, x: Tensor, backend: str = "auto") -> None:
        self.add_by(weight, lambda total, keep: add_product_(total, gradient, x, keep=keep, backend=backend))

    def add_by(self, weight: nn.Parameter, add: AddInto) -> None:
        fresh = weight.grad is None
        if fresh:
            weight.grad = self.place_for(weight)
        add(weight.grad, not fresh)
        self.tell(weight)

    def total(self, weight: nn.Parameter) -> Tensor:
        if weight.grad is None:
            weight.grad = self.place_for(weight).zero_()
        return weight.grad

    def resume(self, weight: nn.Parameter, total: Tensor) -> bool:
        before, weight.grad = weight.grad, total
        if before is not None and before is not total:
            total.copy_(before)
        return before is None

    def tell(self, weight: nn.Parameter) -> None:
        for hook in tuple((weight._post_accumulate_grad_hooks or {}).values()):
            hook(weight)

    def place_for(self, weight: nn.Parameter) -> Tensor:
        """Where the gradient comes to lie; what is there now does not count."""
        return torch.empty_like(weight, dtype=weight.grad_dtype or weight.dtype, requires_grad=False)


AddProduct = Callable[[Tensor, Tensor], None]
"""Adds gradient [T, out]^T x [T, in] to the gradient of one weight."""


def sum_of(weight: Tensor) -> GradientSum | None:
    """What sums the gradients of `weight`, or None: autograd does, as it must where a hook is to see each gradient."""
    return None if weight._backward_hooks else getattr(weight, ATTRIBUTE, None)


def adder_of(weight: Tensor, backend: str = "auto") -> AddProduct | None:
    """What a linear's backward pass gives its products to, where it is to keep them from autograd; else None.
    backend: of `product_`.

    Such a weight takes part in the linear detached: autograd would call its hooks for a gradient that is not there.
    """
    total = sum_of(weight)
    if total is None or not weight.requires_grad or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return partial(total.add_product, weight, backend=backend)


def sum_in(weight: nn.Parameter, total: GradientSum | None) -> None:
    """Have the gradients of `weight` summed by `total` from now on, wherever it is a linear's; None: by autograd."""
    setattr(weight, ATTRIBUTE, total)


def weight_gradient(gradient: Tensor, x: Tensor, *, backend: str = "auto") -> Tensor:
    """gradient [T, out]^T x [T, in] by itself, in their dtype, where autograd is to sum it. backend: of `product_`."""
    return product_(gradient.new_empty(gradient.shape[1], x.shape[1]), gradient.t(), x, backend=backend)


def gradient_or_sum(
    add: AddProduct | None,
    gradient: Tensor,
    x: Tensor | None,
    wanted: bool,
    *,
    late: LateTensor | None = None,
    backend: str = "auto",
) -> Tensor | None:
    """gradient [..., out]^T x [..., in], given to `add`; where nothing sums it, for autograd, if `wanted`.

    late: what stands for an x that is made again; `add` then has the product when it is there.
    """
    gradient = gradient.flatten(0, -2)
    if late is not None:
        late.when_there(lambda again: add(gradient, again.flatten(0, -2)))
    elif add is not None:
        add(gradient, x.flatten(0, -2))
    elif wanted:
        return weight_gradient(gradient, x.flatten(0, -2), backend=backend)
    return None


def add_product_(total: Tensor, a: Tensor, b: Tensor, *, keep: bool = True, backend: str = "auto") -> None:
    """total [V, H] += a^T b for a [C, V] and b [C, H], summed in the dtype of `total`, at least as wide as theirs.

    keep: whether there is something in `total` yet. backend: of `product_`.
    """
    product_(total, a.t(), b, keep=keep, backend=backend)
