"""Causal self-attention with a fused projection and partial rotary positions.

Shapes: B batch, S sequence, H hidden, N heads of this rank (all, unless the model is split), D head size, R <= D
rotated width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from neox_hf.kernels import ROTARY, causal_attention, causal_softmax, document_attention, rotary
from neox_hf.kernels.attention import check_trains_by_flash_attention_4
from neox_hf.kernels.document_spans import DocumentSpans
from neox_hf.modeling.bare import is_bare
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.initialization import output_layer
from neox_hf.parallel import ALONE, ColumnParallelLinear, Linear, TensorRegion, column_linear, row_linear


class GPTNeoXAttention(nn.Module):
    """softmax(q k^T / sqrt D) v for each head, through whichever attention implementation the configuration names.

    `query_key_value` is [3H, H], its rows ordered [N, 3, D]: whole heads are contiguous, and may be split over ranks.
    """

    def __init__(self, config: GPTNeoXConfig, layer_idx: int, region: TensorRegion = ALONE) -> None:
        super().__init__()
        self.config = config
        self.kernels = config.kernels
        self.layer_idx = layer_idx
        self.head_size = config.head_size
        self.attention_dropout = config.attention_dropout
        self.scaling = self.head_size**-0.5
        self.is_causal = True
        self.region = region
        region.share(config.num_attention_heads, "num_attention_heads")
        hidden, bias = config.hidden_size, config.attention_bias
        self.query_key_value = column_linear(hidden, 3 * hidden, region, bias=bias, kernels=config.kernels)
        self.dense = output_layer(row_linear(hidden, hidden, region, bias=bias, kernels=config.kernels))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | DocumentSpans | None,
        layer_past: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        leave_bias: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, S, H] -> ([B, S, H], weights [B, N, S, keys] or None where the implementation has none).

        leave_bias: the caller adds the bias of `dense`.
        """
        attended, weights = self.attended(hidden_states, attention_mask, layer_past, position_embeddings, **kwargs)
        dense = self.dense.product if leave_bias else self.dense
        return dense(attended), weights

    def attended(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | DocumentSpans | None,
        layer_past: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What `dense` reads, [B, S, N D], and the weights."""
        qkv, bias = self._project(hidden_states)
        cos, sin = position_embeddings
        query, key, value = rotary(qkv, cos, sin, bias=bias, backend=self.kernels)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        kwargs |= {"scaling": self.scaling, "dropout": self.attention_dropout if self.training else 0.0}
        plain = attention_mask is None and layer_past is None and kwargs.get("is_causal", True)
        attend = self._implementation(plain or isinstance(attention_mask, DocumentSpans))
        with self.region.own_random(query.device, kwargs["dropout"]):
            output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return output.reshape(*qkv.shape[:2], -1), weights

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """The fused projection [B, S, N, 3, D], and its bias if the rotation's kernel is to sum that one's gradient."""
        linear = self.query_key_value
        leaves = is_bare(linear, Linear, ColumnParallelLinear) and linear.may_leave_bias
        leaves = leaves and ROTARY.has_kernel_for(self.kernels, hidden_states)
        fused = linear.leaving_bias(hidden_states) if leaves else linear(hidden_states)
        return fused.view(*fused.shape[:-1], -1, 3, self.head_size), linear.bias if leaves else None

    def _implementation(self, unmasked: bool) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """The implementation that the configuration names now: `set_attn_implementation` may change it between passes.

        unmasked: spans say what is seen, or there is neither a mask nor a cache, so that a causal one will do which
            nobody makes.
        """
        name = self.config._attn_implementation
        if name == "sdpa" and unmasked:
            return unmasked_attention
        if name == "flash_attention_4" and self.training:
            check_trains_by_flash_attention_4(self.head_size, self.query_key_value.weight.device)
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)


def unmasked_attention(
    module: GPTNeoXAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: DocumentSpans | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """`kernels.causal_attention`, or `document_attention` within spans, in the signature of transformers' own."""
    settings = {"scale": scaling, "dropout": dropout, "backend": module.kernels}
    if spans is None:
        return causal_attention(query, key, value, **settings), None
    return document_attention(query, key, value, spans, **settings), None


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, softmax in fp32: the implementation that also returns its weights.

    query, key, value [B, N, S, D]; an additive mask [B, 1, S, keys], or None for the causal one, or for none at all
    where attention is not causal (is_causal, by default the configuration's). Returns ([B, S, N, D], weights
    [B, N, S, keys]).
    """
    scores = torch.matmul(query, key.transpose(2, 3))
    if is_causal is None:
        is_causal = getattr(module.config, "is_causal", True)
    if attention_mask is None and is_causal:
        weights = causal_softmax(scores, scaling, overwrite=True, backend=module.kernels)
    else:
        masked = scores * scaling if attention_mask is None else scores * scaling + attention_mask
        weights = F.softmax(masked, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights
