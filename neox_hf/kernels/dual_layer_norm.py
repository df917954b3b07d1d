"""Two layer norms of one input, as a parallel residual block wants them.

    n = (x - mean(x)) / sqrt(var(x) + eps)
    y1 = n * weight1 + bias1        y2 = n * weight2 + bias2

Shapes: x [..., H], weights and biases [H]; returns two tensors [..., H]. Statistics over H, in fp32. x and the weights
may be of two dtypes; the results have x's.
Source: GPT-NeoX-20B (arXiv 2204.06745), section 2.1: the attention and the MLP branch each have their own affine, but
both normalise the same x. The kernel reads x once.

With the residual stream beside it, as in `layer_norm`: passed on, or summed up first.
"""

from torch import Tensor

from neox_hf.kernels.dispatch import Op
from neox_hf.kernels.layer_norm import layer_norm_reference
from neox_hf.kernels.residual_add import residual_add_reference
from neox_hf.kernels.row_norm import row_norm


def dual_layer_norm_reference(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Two plain layer norms. Sharing n between two affines is slower in eager torch: two more passes over memory."""
    return layer_norm_reference(x, weight1, bias1, eps), layer_norm_reference(x, weight2, bias2, eps)


def residual_dual_layer_norm_reference(
    x: Tensor, *affines_and_eps: Tensor | float | None, makes_again: bool = False
) -> tuple[Tensor, ...]:
    """x itself, and its norms, which are always kept."""
    return x, *dual_layer_norm_reference(x, *affines_and_eps)


def add_dual_layer_norm_reference(
    x: Tensor, first: Tensor, second: Tensor | None, *affines_and_eps: Tensor | float | None
) -> tuple[Tensor, ...]:
    """The sum in x's dtype, then the norms of what was rounded."""
    total = residual_add_reference(x, first, second)
    return total, *dual_layer_norm_reference(total, *affines_and_eps)


def dual_layer_norm_triton(x: Tensor, *affines_and_eps: Tensor | float | None) -> tuple[Tensor, ...]:
    *affines, eps = affines_and_eps
    return row_norm(x, tuple(affines), eps, kind="layer")


def residual_dual_layer_norm_triton(
    x: Tensor, *affines_and_eps: Tensor | float | None, makes_again: bool = False
) -> tuple[Tensor, ...]:
    *affines, eps = affines_and_eps
    return row_norm(x, tuple(affines), eps, kind="layer", passes_on=True, makes_again=makes_again)


def add_dual_layer_norm_triton(
    x: Tensor, first: Tensor, second: Tensor | None, *affines_and_eps: Tensor | float | None
) -> tuple[Tensor, ...]:
    *affines, eps = affines_and_eps
    return row_norm(x, tuple(affines), eps, kind="layer", branches=(first, second))


DUAL_LAYER_NORM = Op("dual_layer_norm", torch=dual_layer_norm_reference, triton=dual_layer_norm_triton)
RESIDUAL_DUAL_LAYER_NORM = Op(
    "residual_dual_layer_norm", torch=residual_dual_layer_norm_reference, triton=residual_dual_layer_norm_triton
)
ADD_DUAL_LAYER_NORM = Op("add_dual_layer_norm", torch=add_dual_layer_norm_reference, triton=add_dual_layer_norm_triton)


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


def residual_dual_layer_norm(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    eps: float,
    *,
    makes_again: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., H] without a copy, and `dual_layer_norm` of it. Whoever goes on with the first spares x's gradient an
    addition of two tensors.

    makes_again: the backward kernel makes both norms' results once more, so that linears need not keep them.
    """
    implementation = RESIDUAL_DUAL_LAYER_NORM.choose(backend, x)
    return implementation(x, weight1, bias1, weight2, bias2, eps, makes_again=makes_again)


def add_dual_layer_norm(
    x: Tensor,
    first: Tensor,
    second: Tensor | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    eps: float,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """x + first [+ second], all [..., H], and `dual_layer_norm` of the sum. Their gradients are one tensor."""
    return ADD_DUAL_LAYER_NORM.choose(backend, x)(x, first, second, weight1, bias1, weight2, bias2, eps)
