"""Root-mean-square normalisation, as GPT-NeoX has it: eps stands beside the root, not under it.

    y = x / (sqrt(mean(x^2)) + eps) * weight

Shapes: x [..., H], weight [H]; returns [..., H] in x's dtype. The mean is over H, or over its first `measured` elements
(partial RMS norm), in fp32.
Source: Zhang and Sennrich, 2019, arXiv 1910.07467; GPT-NeoX's `RMSNorm`, whose eps is 1e-8 and whose `p` is
`measured` / H. Under the root eps would count where the RMS is not far above sqrt(eps), at 1e-4 for this one.
"""

import torch
from torch import Tensor

from neox_hf.kernels.dispatch import Op
from neox_hf.kernels.row_norm import row_norm


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, measured: int | None) -> Tensor:
    """Computed in fp32 at least, and rounded once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    counted = wide if measured is None else wide[..., :measured]
    # The norm, whose gradient is zero where it is zero, and not the root of a mean, whose gradient is NaN there.
    size = torch.linalg.vector_norm(counted, dim=-1, keepdim=True) * max(counted.shape[-1], 1) ** -0.5
    return (wide / (size + eps) * weight).to(x.dtype)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, measured: int | None) -> Tensor:
    return row_norm(x, (weight,), eps, kind="rms", measured=measured)[0]


RMS_NORM = Op("rms_norm", torch=rms_norm_reference, triton=rms_norm_triton)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, measured: int | None = None, backend: str = "auto") -> Tensor:
    """Divide x [..., H] by its root mean square, over the first `measured` elements where given; scale by weight [H].

    Raises:
        ValueError: `measured` is not from 1 to H.
    """
    if measured is not None and not 1 <= measured <= x.shape[-1]:
        raise ValueError(f"rms_norm measures {measured} of {x.shape[-1]} elements; choose from 1 to {x.shape[-1]}")
    return RMS_NORM.choose(backend, x)(x, weight, eps, measured)
