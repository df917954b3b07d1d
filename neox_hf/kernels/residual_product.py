"""The product that closes a block: what it adds to lands in the residual stream.

    out = stream + branch + y weight^T + bias1 + bias2

Shapes: y [..., F], weight [H, F], stream and branch [..., H], biases [H]; returns [..., H].

One kernel where quack is installed and that is quicker (`fused_product.py`), which rounds once; else the product,
rounded, and the sum behind it.
"""

import torch
from torch import Tensor

from neox_hf.kernels.bias_dropout_residual import fill_residual_
from neox_hf.kernels.fused_product import FusedProduct, Tile, epilogues, fused_tile
from neox_hf.kernels.product import is_chosen, linear_product
from neox_hf.kernels.registration import register, register_fake

RESIDUAL = FusedProduct("product, residual", ("192x128 1x2",))


@register("residual_product")
def residual_product(
    y: Tensor, weight: Tensor, stream: Tensor, branch: Tensor, bias1: Tensor, bias2: Tensor, backend: str
) -> Tensor:
    """The new stream. backend: of `product_`."""
    inner, before, added = (x.flatten(0, -2) for x in (y, stream.contiguous(), branch.contiguous()))

    def apart() -> tuple[Tensor]:
        out = torch.empty_like(before)
        product = linear_product(inner, weight, backend=backend)
        fill_residual_(out, before, added, product, (bias1, bias2), backend=backend)
        return (out,)

    def fused(tile: Tile) -> tuple[Tensor]:
        out = torch.empty_like(before)
        arguments = {"branch": added, "bias1": bias1[None], "bias2": bias2[None]}
        epilogues().residual.gemm(inner, weight, out, before, epi_args=arguments, **tile.arguments)
        return (out,)

    tile = None
    operands = (inner, weight, before, added, bias1, bias2)
    if is_chosen(backend, inner, weight.t()) and all(x.dtype == inner.dtype for x in operands):
        tile = fused_tile(RESIDUAL, operands, (*inner.shape, weight.shape[0]), apart, fused)
    (out,) = apart() if tile is None else fused(tile)
    return out.view_as(stream)


@register_fake(residual_product)
def _(y: Tensor, weight: Tensor, stream: Tensor, branch: Tensor, bias1: Tensor, bias2: Tensor, backend: str) -> Tensor:
    return torch.empty_like(stream, memory_format=torch.contiguous_format)
