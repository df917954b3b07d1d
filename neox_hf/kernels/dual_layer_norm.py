"""Two layer norms of one input, as a parallel residual block wants them.

    n = (x - mean(x)) / sqrt(var(x) + eps)
    y1 = n * weight1 + bias1        y2 = n * weight2 + bias2

Shapes: x [..., H], weights and biases [H]; returns two tensors [..., H]. Statistics over H, in fp32.
Source: GPT-NeoX-20B (arXiv 2204.06745), section 2.1: the attention and the MLP branch each have their own affine, but
both normalise the same x. A fused kernel can therefore read x once.
"""

from torch import Tensor

from neox_hf.kernels.dispatch import Op
from neox_hf.kernels.layer_norm import layer_norm_reference


def dual_layer_norm_reference(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Two plain layer norms. Sharing n between two affines is slower in eager torch: two more passes over memory."""
    return layer_norm_reference(x, weight1, bias1, eps), layer_norm_reference(x, weight2, bias2, eps)


DUAL_LAYER_NORM = Op("dual_layer_norm", torch=dual_layer_norm_reference)


def dual_layer_norm(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    eps: float,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Normalise x [..., H] over H and apply two affines [H]; returns both results, in order."""
    return DUAL_LAYER_NORM.choose(backend, x)(x, weight1, bias1, weight2, bias2, eps)
