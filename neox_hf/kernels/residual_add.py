"""The one sum that closes a residual block.

    y = x + first [+ second]

Shapes: all [..., H]; returns [..., H].
Source: GPT-J and GPT-NeoX-20B (arXiv 2204.06745), section 2.1.
"""

from torch import Tensor

from neox_hf.kernels.bias_dropout_residual import bias_dropout_residual_triton
from neox_hf.kernels.dispatch import Op


def residual_add_reference(x: Tensor, first: Tensor, second: Tensor | None) -> Tensor:
    """The two small branches first: their sum rounds less than x's would."""
    return first + x if second is None else second + first + x


def residual_add_triton(x: Tensor, first: Tensor, second: Tensor | None) -> Tensor:
    """Three terms in one pass, rounded once. Of two, torch makes one pass too."""
    if second is None:
        return residual_add_reference(x, first, second)
    return bias_dropout_residual_triton(x, first, None, second, None, 0.0, None)


RESIDUAL_ADD = Op("residual_add", torch=residual_add_reference, triton=residual_add_triton)


def residual_add(x: Tensor, first: Tensor, second: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Add one branch [..., H], or two (attention and MLP of a parallel block), to the residual stream x [..., H]."""
    return RESIDUAL_ADD.choose(backend, x)(x, first, second)
