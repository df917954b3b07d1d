"""Scale normalisation: rows of one length.

    y = g * x / max(||x||, eps)

Shapes: x [..., H], g one number, [] or [1]; returns [..., H] in x's dtype. The norm is over H, in fp32.
Source: Nguyen and Salazar, 2019, arXiv 1910.05895; GPT-NeoX's `ScaleNorm`.
"""

import torch
from torch import Tensor

from neox_hf.kernels.dispatch import Op
from neox_hf.kernels.row_norm import row_norm


def scale_norm_reference(x: Tensor, g: Tensor, eps: float) -> Tensor:
    """Computed in fp32 at least, and rounded once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp(min=eps)
    return (g * wide / size).to(x.dtype)


def scale_norm_triton(x: Tensor, g: Tensor, eps: float) -> Tensor:
    return row_norm(x, (g,), eps, kind="scale")[0]


SCALE_NORM = Op("scale_norm", torch=scale_norm_reference, triton=scale_norm_triton)


def scale_norm(x: Tensor, g: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """Scale each row of x [..., H] to length g; one shorter than eps is divided by eps."""
    return SCALE_NORM.choose(backend, x)(x, g, eps)
