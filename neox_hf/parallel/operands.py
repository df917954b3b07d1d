"""What autograd functions of linears do with their operands."""

from torch import Tensor

from neox_hf.kernels.autocast import autocast_dtype
from neox_hf.kernels.weight_gradient import AddProduct, gradient_or_sum


def weight_gradients(
    add: AddProduct | None, gradient: Tensor, x: Tensor, wanted: tuple[bool, bool], backend: str
) -> tuple[Tensor | None, Tensor | None]:
    """Of weight [out, in] and bias [out], from the output's gradient [..., out] and x [..., in].

    add: where the weight's goes instead. backend: of `product_`.
    """
    for_weight = gradient_or_sum(add, gradient, x, wanted[0], backend=backend)
    return for_weight, gradient.flatten(0, -2).sum(0) if wanted[1] else None


def in_autocast_dtype(*operands: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast would make of the operands of a linear; it does not reach into an autograd function."""
    dtype = autocast_dtype(operands[0].device)
    if dtype is None:
        return operands
    return tuple(operand if operand is None else operand.to(dtype) for operand in operands)
