"""The one block."""

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from neox_hf.kernels import BIAS_DROPOUT_RESIDUAL, bias_dropout_residual, draw_dropout_seed, residual_add
from neox_hf.modeling.attention import GPTNeoXAttention
from neox_hf.modeling.bare import is_bare
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.mlp import GPTNeoXMLP
from neox_hf.modeling.norms import GPTNeoXLayerNorm, affines_of, normalize, normalize_twice
from neox_hf.parallel import ALONE, Linear, RowParallelLinear, TensorRegion, enter, leave_by_parts


class GPTNeoXLayer(GradientCheckpointingLayer):
    """Attention and MLP around a residual stream x [B, S, H].

    parallel:    x + attention(norm1(x)) + mlp(norm2(x))
    sequential:  y = x + attention(norm1(x));  y + mlp(norm2(y))

    The two norms of the parallel form are separate on purpose: the released weights were trained with two.

    Where a tensor group splits the block, each branch enters its region before the norms and leaves it as a partial sum
    behind the dropout; the parallel form leaves once, with both, and without dropout part by part of the tokens, its
    messages behind products. With sequence parallelism x is this rank's part of the sequence.
    """

    def __init__(self, config: GPTNeoXConfig, layer_idx: int, region: TensorRegion = ALONE) -> None:
        super().__init__()
        self.region = region
        self.kernels = config.kernels
        self.use_parallel_residual = config.use_parallel_residual
        self.input_layernorm = GPTNeoXLayerNorm(config, region)
        self.post_attention_layernorm = GPTNeoXLayerNorm(config, region)
        self.post_attention_dropout = nn.Dropout(config.hidden_dropout)
        self.post_mlp_dropout = nn.Dropout(config.hidden_dropout)
        self.attention = GPTNeoXAttention(config, layer_idx, region)
        self.mlp = GPTNeoXMLP(config, region)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        layer_past: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """position_embeddings: cos and sin of the rotary angles. The rest goes to the attention implementation; the
        order is that of transformers' block.
        """
        seen = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": use_cache,
            "layer_past": layer_past,
            "position_embeddings": position_embeddings,
            **kwargs,
        }
        region = self.region.in_mode(self.training)
        if self.use_parallel_residual:
            norms = self.input_layernorm, self.post_attention_layernorm
            entered, affines = enter(hidden_states, region, affines_of(*norms), self.attention, self.mlp)
            stream, *normed = normalize_twice(*norms, affines, entered)
            dropouts = (self.post_attention_dropout, self.post_mlp_dropout)
            if self._leaves_by_parts(region, dropouts):
                attended = self.attention.attended(normed[0], **seen)[0]
                mlp = self.mlp.leaving(normed[1])
                outside = self._outside(hidden_states, stream, region)
                return leave_by_parts(region, outside, (attended, self.attention.dense), (mlp, self.mlp.dense_4h_to_h))
            biases = self._biases_left(stream, region, dropouts)
            leave = {"leave_bias": True} if biases else {}
            attended = self.attention(normed[0], **leave, **seen)[0]
            if biases and not self._rate_in_join(stream, region, dropouts) and self.mlp.joins(normed[1], biases[0]):
                return self.mlp.joined(normed[1], stream, attended, biases[0])
            branches = (attended, self.mlp(normed[1], **leave))
            return self._joined(self._outside(hidden_states, stream, region), region, branches, dropouts, biases)

        entered, affine = enter(hidden_states, region, affines_of(self.input_layernorm), self.attention)
        stream, normed = normalize(self.input_layernorm, affine, entered)
        stream = self._outside(hidden_states, stream, region)
        branch = self.attention(normed, **seen)[0]
        hidden_states = self._joined(stream, region, (branch,), (self.post_attention_dropout,))
        entered, affine = enter(hidden_states, region, affines_of(self.post_attention_layernorm), self.mlp)
        stream, normed = normalize(self.post_attention_layernorm, affine, entered)
        stream = self._outside(hidden_states, stream, region)
        return self._joined(stream, region, (self.mlp(normed),), (self.post_mlp_dropout,))

    def _leaves_by_parts(self, region: TensorRegion, dropouts: tuple[nn.Module, ...]) -> bool:
        """Whether both branches are sums that end in a row linear, between which and the message nothing comes."""
        if region.size == 1 or region.sequence:
            return False
        idle = all(is_bare(dropout, nn.Dropout) and not (dropout.p and dropout.training) for dropout in dropouts)
        bare = is_bare(self.attention, GPTNeoXAttention) and is_bare(self.mlp, GPTNeoXMLP)
        return idle and bare and all(is_bare(each, RowParallelLinear) for each in self._dense)

    @property
    def _dense(self) -> tuple[nn.Module, nn.Module]:
        """The linears that end the two branches."""
        return self.attention.dense, self.mlp.dense_4h_to_h

    def _biases_left(
        self, stream: Tensor, region: TensorRegion, dropouts: tuple[nn.Module, ...]
    ) -> tuple[Tensor, ...] | None:
        """Biases that the two branches leave to the sum behind them: there both have one gradient, made once."""
        if self._rate_in_join(stream, region, dropouts) is None:
            return None
        if not all(is_bare(each, GPTNeoXAttention, GPTNeoXMLP) for each in (self.attention, self.mlp)):
            return None
        if not all(is_bare(each, Linear) and each.bias is not None and not each.trains_in_fp8 for each in self._dense):
            return None
        return tuple(each.bias for each in self._dense)

    def _rate_in_join(self, stream: Tensor, region: TensorRegion, dropouts: tuple[nn.Module, ...]) -> float | None:
        """The probability with which the kernel of the sum drops elements; None if dropout is left to its modules."""
        rates = [dropout.p if dropout.training else 0.0 for dropout in dropouts if is_bare(dropout, nn.Dropout)]
        alike = len(rates) == len(dropouts) and len(set(rates)) == 1
        if not alike or region.size > 1 or not BIAS_DROPOUT_RESIDUAL.has_kernel_for(self.kernels, stream):
            return None
        return rates[0]

    def _joined(
        self,
        stream: Tensor,
        region: TensorRegion,
        branches: tuple[Tensor, ...],
        dropouts: tuple[nn.Module, ...],
        biases: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """stream + the dropout of each branch, which are partial sums where the region splits the block.

        biases: what the branches still lack, by branch.
        """
        rate = self._rate_in_join(stream, region, dropouts)
        if rate or biases:
            first, second = (*branches, None)[:2]
            bias1, bias2 = biases or (None, None)
            seed = draw_dropout_seed(stream.device) if rate else None
            return bias_dropout_residual(stream, first, bias1, second, bias2, rate, seed, backend=self.kernels)
        dropped = [dropout(branch) for dropout, branch in zip(dropouts, branches, strict=True)]
        return residual_add(stream, *region.leave_together(*dropped), backend=self.kernels)

    def _outside(self, before: Tensor, entered: Tensor, region: TensorRegion) -> Tensor:
        """The residual stream, whose gradient meets that of the norms in their kernel. Where gradients in there are
        partial, the stream's counts once, so that one rank alone has it: `enter` sums it with the others."""
        if region.size == 1 or region.sequence or region.rank == 0:
            return entered
        return before.detach()
