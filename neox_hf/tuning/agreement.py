"""Whether two launches of one kernel compute the same, but for the order of their sums and the last place."""

from collections.abc import Sequence

import torch
from torch import Tensor

OF_THE_LARGEST = 2.0**-18
"""What the order of a sum in fp32 may change, as a share of the tensor's largest element: 64 of its last places."""


def disagreement(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> str | None:
    """How results differ by more than rounding; None where they do not.

    An element may be off by one last place of its dtype, and by `OF_THE_LARGEST`.
    """
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            return f"result {number} is {ours.dtype} {list(ours.shape)}, not {theirs.dtype} {list(theirs.shape)}"
        if ours.numel() == 0:
            continue
        exact = theirs.float()
        error, size = (ours.float() - exact).abs_(), exact.abs()
        allowed = size * torch.finfo(theirs.dtype).eps + OF_THE_LARGEST * size.max()
        if not bool((error <= allowed).all()):
            return f"result {number} differs by {error.max().item():.3g}, where {size.max().item():.3g} is the largest"
    return None
