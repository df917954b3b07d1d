"""The one block."""

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from neox_hf.kernels import residual_add
from neox_hf.modeling.attention import GPTNeoXAttention
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.mlp import GPTNeoXMLP
from neox_hf.modeling.norms import GPTNeoXLayerNorm, normalize_twice


class GPTNeoXLayer(GradientCheckpointingLayer):
    """Attention and MLP around a residual stream x [B, S, H].

    parallel:    x + attention(norm1(x)) + mlp(norm2(x))
    sequential:  y = x + attention(norm1(x));  y + mlp(norm2(y))

    The two norms of the parallel form are separate on purpose: the released weights were trained with two.
    """

    def __init__(self, config: GPTNeoXConfig, layer_idx: int) -> None:
        super().__init__()
        self.kernels = config.kernels
        self.use_parallel_residual = config.use_parallel_residual
        self.input_layernorm = GPTNeoXLayerNorm(config)
        self.post_attention_layernorm = GPTNeoXLayerNorm(config)
        self.post_attention_dropout = nn.Dropout(config.hidden_dropout)
        self.post_mlp_dropout = nn.Dropout(config.hidden_dropout)
        self.attention = GPTNeoXAttention(config, layer_idx)
        self.mlp = GPTNeoXMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        layer_past: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """position_embeddings: cos and sin of the rotary angles. Other arguments go to the attention implementation."""
        seen = {
            "attention_mask": attention_mask,
            "position_embeddings": position_embeddings,
            "layer_past": layer_past,
            **kwargs,
        }
        if self.use_parallel_residual:
            for_attention, for_mlp = normalize_twice(self.input_layernorm, self.post_attention_layernorm, hidden_states)
            attended = self.post_attention_dropout(self.attention(for_attention, **seen)[0])
            transformed = self.post_mlp_dropout(self.mlp(for_mlp))
            return residual_add(hidden_states, attended, transformed, backend=self.kernels)

        attended = self.post_attention_dropout(self.attention(self.input_layernorm(hidden_states), **seen)[0])
        hidden_states = attended + hidden_states
        return self.post_mlp_dropout(self.mlp(self.post_attention_layernorm(hidden_states))) + hidden_states
