"""Layer normalisation.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

Shapes: x [..., H], weight and bias [H]; returns [..., H]. Mean and (biased) variance are over H, in fp32.
Source: Ba et al., 2016, arXiv 1607.06450.
"""

from torch import Tensor
from torch.nn import functional as F

from neox_hf.kernels.dispatch import Op


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """torch's own layer norm, which keeps its statistics in fp32 for every dtype."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


LAYER_NORM = Op("layer_norm", torch=layer_norm_reference)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, backend: str = "auto") -> Tensor:
    """Normalise x [..., H] over H, then scale by weight [H] and shift by bias [H]."""
    return LAYER_NORM.choose(backend, x)(x, weight, bias, eps)
