"""The one sum that closes a parallel residual block.

    y = x + attention + mlp

Shapes: all [..., H]; returns [..., H].
Source: GPT-J and GPT-NeoX-20B (arXiv 2204.06745), section 2.1.
"""

from torch import Tensor

from neox_hf.kernels.dispatch import Op


def residual_add_reference(x: Tensor, attention: Tensor, mlp: Tensor) -> Tensor:
    """The two small branches first: their sum rounds less than x's would."""
    return mlp + attention + x


RESIDUAL_ADD = Op("residual_add", torch=residual_add_reference)


def residual_add(x: Tensor, attention: Tensor, mlp: Tensor, *, backend: str = "auto") -> Tensor:
    """Add both branches [..., H] to the residual stream x [..., H]."""
    return RESIDUAL_ADD.choose(backend, x.device)(x, attention, mlp)
