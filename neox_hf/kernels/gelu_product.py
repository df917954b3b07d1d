"""A product that ends in GELU, and the one whose result goes back through GELU.

    z = x weight^T        y = gelu(z + bias)
    dz = (dout weight) gelu'(z + bias)        dbias = sum over tokens of dz

Shapes: x [..., K], weight [F, K], z and y [..., F]; dout [..., K], weight [K, F], z and dz [..., F]; bias [F].

Each is one kernel where quack is installed and that is quicker (`fused_product.py`), else cuBLAS's product and the
kernel of `bias_gelu.py` behind it. Kept for the backward pass is z, without the bias, either way.
"""

import torch
from torch import Tensor

from neox_hf.kernels.bias_gelu import bias_gelu_backward, bias_gelu_forward
from neox_hf.kernels.column_sums import finish_column_sums
from neox_hf.kernels.fused_product import FusedProduct, Tile, epilogues, fused_tile
from neox_hf.kernels.product import is_chosen, linear_product
from neox_hf.kernels.registration import register, register_fake

FORWARD_TILES = ("192x128 1x2", "128x192 2x1")
BACKWARD_TILES = ("128x160 1x2", "128x192 1x2")

FORWARD = {form: FusedProduct(f"product, gelu {form}", FORWARD_TILES) for form in ("erf", "tanh")}
BACKWARD = {
    (form, again): FusedProduct(f"product, gelu {form} backward{' and again' if again else ''}", BACKWARD_TILES)
    for form in ("erf", "tanh")
    for again in (False, True)
}


@register("gelu_product")
def gelu_product(x: Tensor, weight: Tensor, bias: Tensor, form: str, backend: str) -> tuple[Tensor, Tensor]:
    """z and y. form: `erf` or `tanh`. backend: of `product_`."""
    tokens, shape = x.flatten(0, -2), (*x.shape[:-1], weight.shape[0])

    def apart() -> tuple[Tensor, Tensor]:
        z = linear_product(tokens, weight, backend=backend)
        return z, bias_gelu_forward(z, bias, form)

    def fused(tile: Tile) -> tuple[Tensor, Tensor]:
        z = tokens.new_empty(tokens.shape[0], weight.shape[0])
        y = torch.empty_like(z)
        end = getattr(epilogues(), f"{form}_gelu")
        end.gemm(tokens, weight, z, epi_args={"bias": bias[None], "y": y}, **tile.arguments)
        return z, y

    tile = None
    if is_chosen(backend, tokens, weight.t()):
        sizes = (*tokens.shape, weight.shape[0])
        tile = fused_tile(FORWARD[form], (tokens, weight, bias), sizes, apart, fused)
    z, y = apart() if tile is None else fused(tile)
    return z.view(shape), y.view(shape)


@register_fake(gelu_product)
def _(x: Tensor, weight: Tensor, bias: Tensor, form: str, backend: str) -> tuple[Tensor, Tensor]:
    z = x.new_empty(*x.shape[:-1], weight.shape[0])
    return z, torch.empty_like(z)


@register("gelu_product_backward")
def gelu_product_backward(
    dout: Tensor,
    weight: Tensor,
    z: Tensor,
    bias: Tensor,
    form: str,
    sum_dtype: torch.dtype | None,
    recompute: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dz; dbias in `sum_dtype`; and y again if `recompute`. What is not asked for is an empty tensor."""
    tokens, inner = dout.flatten(0, -2).contiguous(), z.flatten(0, -2)

    def apart() -> tuple[Tensor, Tensor, Tensor]:
        dy = linear_product(tokens, weight.t(), backend=backend)
        return bias_gelu_backward(dy, inner, bias, form, sum_dtype, recompute)

    def fused(tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        dz = torch.empty_like(inner)
        partial = dz.new_empty(-(-dz.shape[0] // tile.rows), dz.shape[1], dtype=torch.float32)
        arguments = {"bias": bias[None], "dbias": partial}
        y = torch.empty_like(inner) if recompute else inner.new_empty(0)
        end = getattr(epilogues(), f"{form}_gelu_backward{'_again' if recompute else ''}")
        arguments |= {"y": y} if recompute else {}
        end.gemm(tokens, weight.t(), dz, inner, epi_args=arguments, **tile.arguments)
        return dz, dz.new_empty(0) if sum_dtype is None else finish_column_sums(partial, sum_dtype), y

    tile = None
    if is_chosen(backend, tokens, weight):
        sizes = (*tokens.shape, inner.shape[1])
        operands = (tokens, weight, inner, bias)
        tile = fused_tile(BACKWARD[form, recompute], operands, sizes, apart, fused)
    dz, dbias, y = apart() if tile is None else fused(tile)
    return dz.view_as(z), dbias, y.view_as(z) if recompute else y


@register_fake(gelu_product_backward)
def _(
    dout: Tensor,
    weight: Tensor,
    z: Tensor,
    bias: Tensor,
    form: str,
    sum_dtype: torch.dtype | None,
    recompute: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    sums = z.new_empty(0 if sum_dtype is None else z.shape[-1], dtype=sum_dtype or z.dtype)
    return dz, sums, torch.empty_like(dz) if recompute else z.new_empty(0)
