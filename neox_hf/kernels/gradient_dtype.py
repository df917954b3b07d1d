"""Which dtype a parameter's gradient is worth having in."""

import torch
from torch import Tensor


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """What autograd keeps of the parameter's gradient: a leaf's `grad_dtype` may be wider than the parameter.

    A compiled graph keeps no more than the parameter's own dtype.
    """
    if torch.compiler.is_compiling() or not parameter.is_leaf:
        return parameter.dtype
    return parameter.grad_dtype or torch.promote_types(parameter.dtype, torch.float32)
