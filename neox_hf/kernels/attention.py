"""Causal attention where a plain causal mask will do, on heads that are strided views of the fused projection.

    softmax(scale q k^T) v, position i seeing positions 0 ... i

Torch's own choice (cuDNN on Hopper, FlashAttention 2 elsewhere) is the default; it takes the views as they are, and
returns three separate gradients. FlashAttention 4, where it is installed and has been checked, writes gradients into
one buffer laid out like the projection, which spares the pass that puts them together.

Shapes: query, key and value [B batch, N heads, S sequence, D head size]; the output is [B, S, N, D] and contiguous.
Source: Dao et al., 2022, arXiv 2205.14135; https://github.com/Dao-AILab/flash-attention, `flash_attn/cute`.
"""

import functools
import importlib
import importlib.metadata
import logging
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from neox_hf.kernels.dispatch import BACKENDS
from neox_hf.kernels.once_differentiable import once_differentiable
from neox_hf.kernels.qkv_gradient import hand_over, heads, interleaved
from neox_hf.kernels.registration import register, register_fake

logger = logging.getLogger(__name__)

AttentionBackend = Literal["sdpa", "flash_attention_4"]

HOPPER = (9, 0)

CHECKED_VERSIONS = ("4.0.0b36",)
"""Of FlashAttention 4, whose functions are called that are not public; and gradients are checked of a version."""

CHECKED_HEAD_SIZES: dict[tuple[int, int], frozenset[int]] = {HOPPER: frozenset({64, 128})}
"""By compute capability, the head sizes at which it gave right gradients and was no slower than cuDNN: on Hopper it is
slower at 96 and 256."""

WRONG_HEAD_SIZES: dict[tuple[int, int], frozenset[int]] = {HOPPER: frozenset({80})}
"""Those at which its gradients were wrong: 0.61 off, relative. Its forward pass is right there."""

HEAD_SIZES = tuple(sorted(frozenset().union(*CHECKED_HEAD_SIZES.values())))


def attention_backend(head_size: int, dtype: torch.dtype, device: torch.device) -> AttentionBackend:
    """What computes causal attention without dropout on such tensors.

    `flash_attention_4` where the package is installed, for bf16 and fp16 on CUDA devices and head sizes of
    `CHECKED_HEAD_SIZES`; else `sdpa`.
    """
    # A compiler may have a symbol for the size, which can be compared; of a constant it can guard no more than a word.
    fits = any(head_size == size and takes_flash_attention_4(size, dtype, device) for size in HEAD_SIZES)
    return "flash_attention_4" if fits else "sdpa"


@torch.compiler.assume_constant_result
def takes_flash_attention_4(head_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether FlashAttention 4 is there and was checked on such tensors. A compiler takes it for a constant."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or not has_flash_attention_4():
        return False
    return head_size in CHECKED_HEAD_SIZES.get(torch.cuda.get_device_capability(device), ())


@functools.cache
def has_flash_attention_4() -> bool:
    """Asked of the installed distributions: that of FlashAttention 2 brings a module of the same name, unusable."""
    try:
        version = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return False
    if version not in CHECKED_VERSIONS:
        logger.info("flash-attn-4 %s is not used: %s was checked", version, ", ".join(CHECKED_VERSIONS))
    return version in CHECKED_VERSIONS


def check_trains_by_flash_attention_4(head_size: int, device: torch.device) -> None:
    """For who has FlashAttention 4 compute attention by its name, as transformers does.

    Raises:
        ValueError: its gradients are known to be wrong.
    """
    if device.type == "cuda" and head_size in WRONG_HEAD_SIZES.get(torch.cuda.get_device_capability(device), ()):
        raise ValueError(
            f"attn_implementation='flash_attention_4' has wrong gradients for heads of {head_size} on this device; "
            "train with sdpa, which takes cuDNN there"
        )


def _flash_attention_4() -> ModuleType:
    return importlib.import_module("flash_attn.cute.interface")


# The names tell selective recomputation that these are attention, to be kept (modeling/recompute.py).
@register("flash_attn_forward")
def flash_attn_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, S, N, D] and, fp32, the logarithm [B, N, S] of each softmax's denominator."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    output, log_sum, *_ = _flash_attention_4()._flash_attn_fwd(
        query, key, value, softmax_scale=scale, causal=True, return_lse=True
    )
    return output, log_sum


@register_fake(flash_attn_forward)
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, count, sequence, size = query.shape
    log_sum = query.new_empty(batch, count, sequence, dtype=torch.float32)
    return query.new_empty(batch, sequence, count, size), log_sum


@register("flash_attn_backward")
def flash_attn_backward(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sum: Tensor, scale: float
) -> Tensor:
    """Gradients of query, key and value, interleaved in one [B, S, N, 3, D]."""
    buffer = interleaved(query)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    for_query, for_key, for_value = buffer.unbind(dim=3)
    _flash_attention_4()._flash_attn_bwd(
        query,
        key,
        value,
        output,
        upstream.contiguous(),
        log_sum,
        softmax_scale=scale,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        dq=for_query,
        dk=for_key,
        dv=for_value,
    )
    return buffer


@register_fake(flash_attn_backward)
def _(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sum: Tensor, scale: float
) -> Tensor:
    return interleaved(query)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        output, log_sum = flash_attn_forward(query, key, value, scale)
        ctx.save_for_backward(query, key, value, output, log_sum)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        buffer = flash_attn_backward(upstream, *ctx.saved_tensors, ctx.scale)
        if not torch.compiler.is_compiling():
            hand_over(buffer, ctx)
        return *heads(buffer), None


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, dropout: float) -> Tensor:
    """Through `scaled_dot_product_attention`, told that the mask is causal rather than given one."""
    output = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scale)
    # Already in this order where a fused kernel made it: they lay the output out as the strides of the query are.
    return output.transpose(1, 2).contiguous()


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, dropout: float = 0.0, backend: str = "auto"
) -> Tensor:
    """Attention of query, key and value [B, N, S, D], each position seeing itself and those before: [B, S, N, D].

    dropout: probability for a weight to be dropped; above 0 torch's SDPA computes it. backend: `torch` is SDPA always;
    otherwise `attention_backend` chooses.

    Raises:
        ValueError: the three are not of one shape (with a cache, a causal mask starts elsewhere), or no such backend.
    """
    if not query.shape == key.shape == value.shape:
        raise ValueError(
            f"causal attention was given query {list(query.shape)}, key {list(key.shape)} and value "
            f"{list(value.shape)}; with a cache, or fewer keys than queries, use the model's other implementations"
        )
    if backend not in BACKENDS:
        raise ValueError(f"kernels={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    fused = backend != "torch" and dropout == 0 and query.numel() > 0
    if fused and attention_backend(query.shape[-1], query.dtype, query.device) == "flash_attention_4":
        return _FlashAttention.apply(query, key, value, scale)
    return sdpa_attention(query, key, value, scale=scale, dropout=dropout)
