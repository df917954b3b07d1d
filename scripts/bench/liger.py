"""Liger's kernels, where `liger-kernel` is installed; it is a peer and no dependency."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor


class NotInstalled(Exception):
    """A peer's package is missing; its rows say so."""


def require() -> None:
    """Raises: NotInstalled: liger-kernel cannot be imported."""
    if find_spec("liger_kernel") is None:
        raise NotInstalled("liger-kernel is not installed")


def layer_norm(eps: float = 1e-5) -> Callable[..., Tensor]:
    require()
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, eps)


def cross_entropy() -> Callable[..., Tensor]:
    """Writes the gradient over the logits."""
    require()
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss()


def linear_cross_entropy(accumulate: torch.dtype | None = None) -> Callable[..., Tensor]:
    """(hidden [N, H], weight [V, H], labels [N]) -> mean loss. accumulate: dtype the weight's gradient grows in."""
    require()
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=accumulate)
    return lambda hidden, weight, labels: loss(weight, hidden, labels)
