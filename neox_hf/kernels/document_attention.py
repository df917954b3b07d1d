"""Causal attention within documents that are packed into rows, or rows that are padded: without a mask.

    softmax over the keys j that i sees of (scale q_i k_j) v_j,   seen: first_i <= j < behind_i, and j kept

A query that sees nothing, in the place of padding, has zeros. Work and memory are those of what is seen, rounded up to
blocks: nothing has the size S x S. The gradients of query, key and value are written into one buffer laid out like the
projection.

Shapes: query, key and value [B batch, N heads, S sequence, D head size], any strides but the last, which is 1; the
output is [B, S, N, D] and contiguous. `DocumentSpans` in `document_spans.py`.
Source: Dao, 2023, arXiv 2307.08691, of the two passes over blocks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neox_hf.kernels.dispatch import Op
from neox_hf.kernels.document_attention_backward import document_attn_backward
from neox_hf.kernels.document_attention_forward import document_attn_forward
from neox_hf.kernels.document_spans import DocumentSpans
from neox_hf.kernels.once_differentiable import once_differentiable
from neox_hf.kernels.qkv_gradient import hand_over, heads


def document_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, spans: DocumentSpans, scale: float, dropout: float = 0.0
) -> Tensor:
    """Through `scaled_dot_product_attention` with the mask [B, 1, S, S] written out."""
    place = torch.arange(query.shape[2], device=query.device)
    seen = (place >= spans.first[..., None]) & (place < spans.behind[..., None])
    if spans.kept is not None:
        seen = seen & spans.kept[:, None, :]
    seen = seen[:, None]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, dropout_p=dropout, scale=scale)
    return output.masked_fill(~seen.any(-1, keepdim=True), 0).transpose(1, 2).contiguous()


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        first: Tensor,
        behind: Tensor,
        end: Tensor,
        kept: Tensor | None,
        scale: float,
    ) -> Tensor:
        output, log_sum = document_attn_forward(query, key, value, first, behind, kept, scale)
        ctx.save_for_backward(query, key, value, first, behind, end, kept, output, log_sum)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        buffer = document_attn_backward(upstream, *ctx.saved_tensors, ctx.scale)
        if not torch.compiler.is_compiling():
            hand_over(buffer, ctx)
        return *heads(buffer), None, None, None, None, None


def document_attention_triton(query: Tensor, key: Tensor, value: Tensor, spans: DocumentSpans, scale: float) -> Tensor:
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    spans = (None if places is None else places.contiguous() for places in spans)
    return _DocumentAttention.apply(query, key, value, *spans, scale)


LARGEST_HEAD = 256
"""Beyond it blocks fit into no device's shared memory, or into few."""

MOST_SAMPLES = 65_535
"""Of one launch: they are a dimension of the grid for which CUDA has 16 bits."""

LEAST_CAPABILITY = (8, 0)
"""Of a CUDA device: before Ampere, multiply-and-add of bf16 and TF32 is not to be had, and blocks do not fit."""


def takes_documents(backend: str, x: Tensor, head_size: int) -> bool:
    """Whether the kernel computes heads of such a size in tensors like `x` [B, S, H], so that nobody needs a mask."""
    fits = head_size <= LARGEST_HEAD and x.shape[0] <= MOST_SAMPLES
    return fits and DOCUMENT_ATTENTION.has_kernel_for(backend, x) and _is_able(x.device)


@torch.compiler.assume_constant_result
def _is_able(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


DOCUMENT_ATTENTION = Op("document_attention", torch=document_attention_reference, triton=document_attention_triton)


def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: DocumentSpans,
    *,
    scale: float,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention of query, key and value [B, N, S, D], each token within its span: [B, S, N, D].

    dropout: probability for a weight to be dropped; above 0 torch's SDPA computes it, with a mask.

    Raises:
        ValueError: shapes differ, the spans are of another batch, the scale is not above 0, or no such backend.
    """
    batch, _, sequence, _ = query.shape
    if not query.shape == key.shape == value.shape or spans.first.shape != (batch, sequence):
        raise ValueError(
            f"document attention was given query {list(query.shape)}, key {list(key.shape)}, value "
            f"{list(value.shape)} and spans {list(spans.first.shape)}; it wants three of one [B, N, S, D], and [B, S]"
        )
    if not scale > 0:
        raise ValueError(f"document attention was given scale={scale}; it wants one above 0")
    if dropout > 0:
        return document_attention_reference(query, key, value, spans, scale, dropout)
    return DOCUMENT_ATTENTION.choose(backend, query)(query, key, value, spans, scale)
