"""Products of eight-bit matrices, both read along the dimension that is summed over.

    c_mn = inverse_a inverse_b sum over k of a_mk b_nk  (+ bias_n)

Shapes: a [M, K], b [N, K], bias [N]; returns [M, N]. Summed in fp32; K and N multiples of 16.

On CUDA it is cuBLASLt's product; `fast` lets it add in the accuracy of the tensor cores' own registers, 14 bits or so,
which forward passes bear and long sums over tokens need not.
"""

import torch
from torch import Tensor

FIRST_CAPABILITY = (8, 9)
"""Of the first GPUs that multiply in eight bits: Ada, then Hopper at (9, 0)."""


def reason_against_device(device: torch.device) -> str | None:
    """Why eight-bit products cannot be computed on `device`; None if they can. A CPU has the reference."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_capability(device)
    if found >= FIRST_CAPABILITY:
        return None
    names = [".".join(map(str, each)) for each in (found, FIRST_CAPABILITY)]
    return (
        f"{torch.cuda.get_device_name(device)} has CUDA capability {names[0]}, and eight bits want {names[1]} or above"
    )


def fp8_product_reference(
    a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """The product in fp32 of what the bytes stand for."""
    total = (a.float() @ b.float().t()) * (inverse_a * inverse_b)
    return (total if bias is None else total + bias.float()).to(dtype)


def fp8_product(
    a: Tensor,
    b: Tensor,
    inverse_a: Tensor,
    inverse_b: Tensor,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """a b^T in `dtype`, fp32 or bf16; at most one of a and b is e5m2."""
    if not _on_tensor_cores(a):
        return fp8_product_reference(a, b, inverse_a, inverse_b, dtype, bias)
    # cuBLASLt adds a bias to half precision alone.
    inside = bias is not None and dtype != torch.float32
    total = torch._scaled_mm(
        a,
        b.t(),
        scale_a=inverse_a,
        scale_b=inverse_b,
        bias=bias.to(dtype) if inside else None,
        out_dtype=dtype,
        use_fast_accum=fast,
    )
    return total if bias is None or inside else total + bias


def add_fp8_product_(
    total: Tensor,
    a: Tensor,
    b: Tensor,
    inverse_a: Tensor,
    inverse_b: Tensor,
    *,
    keep: bool = True,
) -> None:
    """total [M, N] += a b^T, in the dtype of `total`. keep: whether there is something in `total` yet.

    cuBLASLt's product adds to nothing in eight bits, so a sum takes a pass of its own; a first product takes none.
    """
    if keep or not _on_tensor_cores(a):
        made = fp8_product(a, b, inverse_a, inverse_b, total.dtype)
        total.add_(made) if keep else total.copy_(made)
    else:
        torch._scaled_mm(a, b.t(), scale_a=inverse_a, scale_b=inverse_b, out_dtype=total.dtype, out=total)


def _on_tensor_cores(a: Tensor) -> bool:
    return a.is_cuda and a.numel() > 0
