"""Layer normalisation, alone and beside a residual stream.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

Shapes: x [..., H], weight and bias [H]; returns [..., H]. Mean and (biased) variance are over H, in fp32. x and weight
may be of two dtypes; y has x's.
Source: Ba et al., 2016, arXiv 1607.06450.

A residual stream x is read by its norm and by the sum that closes the block. Two forms let one kernel make the whole
gradient of x: `residual_layer_norm` passes x on beside its norm, `add_layer_norm` makes the sum and its norm at once.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from neox_hf.kernels.autocast import autocast_dtype
from neox_hf.kernels.dispatch import Op
from neox_hf.kernels.residual_add import residual_add_reference
from neox_hf.kernels.row_norm import row_norm


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """torch's own layer norm, which keeps its statistics in fp32 for every dtype, but wants one dtype."""
    width = (x.shape[-1],)
    alike = weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
    if alike or autocast_dtype(x.device) is not None:
        return F.layer_norm(x, width, weight, bias, eps)
    wide = torch.promote_types(x.dtype, weight.dtype)
    if bias is not None:
        wide = torch.promote_types(wide, bias.dtype)
    return F.layer_norm(x.to(wide), width, weight.to(wide), None if bias is None else bias.to(wide), eps).to(x.dtype)


def residual_layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, makes_again: bool = False
) -> tuple[Tensor, Tensor]:
    """x itself, and its norm, which is always kept."""
    return x, layer_norm_reference(x, weight, bias, eps)


def add_layer_norm_reference(
    x: Tensor, first: Tensor, second: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum in x's dtype, then the norm of what was rounded."""
    total = residual_add_reference(x, first, second)
    return total, layer_norm_reference(total, weight, bias, eps)


def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return row_norm(x, (weight, bias), eps, kind="layer")[0]


def residual_layer_norm_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, makes_again: bool = False
) -> tuple[Tensor, Tensor]:
    return row_norm(x, (weight, bias), eps, kind="layer", passes_on=True, makes_again=makes_again)


def add_layer_norm_triton(
    x: Tensor, first: Tensor, second: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return row_norm(x, (weight, bias), eps, kind="layer", branches=(first, second))


LAYER_NORM = Op("layer_norm", torch=layer_norm_reference, triton=layer_norm_triton)
RESIDUAL_LAYER_NORM = Op("residual_layer_norm", torch=residual_layer_norm_reference, triton=residual_layer_norm_triton)
ADD_LAYER_NORM = Op("add_layer_norm", torch=add_layer_norm_reference, triton=add_layer_norm_triton)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, backend: str = "auto") -> Tensor:
    """Normalise x [..., H] over H, then scale by weight [H] and shift by bias [H]."""
    return LAYER_NORM.choose(backend, x)(x, weight, bias, eps)


def residual_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, makes_again: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """x [..., H] without a copy, and `layer_norm` of it. Whoever goes on with the first spares x's gradient an addition
    of two tensors.

    makes_again: the backward kernel makes the norm's result once more, so that linears need not keep it.
    """
    return RESIDUAL_LAYER_NORM.choose(backend, x)(x, weight, bias, eps, makes_again)


def add_layer_norm(
    x: Tensor,
    first: Tensor,
    second: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x + first [+ second], all [..., H], and `layer_norm` of the sum. Their gradients are one tensor."""
    return ADD_LAYER_NORM.choose(backend, x)(x, first, second, weight, bias, eps)
