"""`GPTNeoXModel`: embedding, the stack of blocks, final norm."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from neox_hf.kernels import OPS, describe_choice, embedding
from neox_hf.modeling.attention import GPTNeoXAttention
from neox_hf.modeling.bare import is_bare
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.initialization import initialize_matrix
from neox_hf.modeling.layer import GPTNeoXLayer
from neox_hf.modeling.layer_graphs import LayerGraphs
from neox_hf.modeling.masks import causal_mask, flash_documents
from neox_hf.modeling.norms import GPTNeoXLayerNorm
from neox_hf.modeling.positions import GPTNeoXRotaryEmbedding
from neox_hf.parallel import TensorRegion, Topology, VocabParallelEmbedding, vocabulary_embedding

logger = logging.getLogger(__name__)

FOR_THE_LOSS = frozenset({"shift_labels", "num_items_in_batch"})
"""Arguments of a forward pass that pass through the layers unread."""


class GPTNeoXPreTrainedModel(PreTrainedModel):
    """What every GPT-NeoX class shares: what transformers may do with it, and how its weights start."""

    config: GPTNeoXConfig
    base_model_prefix = "gpt_neox"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPTNeoXLayer"]  # noqa: RUF012 - transformers wants plain lists
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": GPTNeoXLayer, "attentions": GPTNeoXAttention}  # noqa: RUF012
    # Buffers that older releases wrote; `attention.dense.bias` is none of them.
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"attention\.bias$",
        r"attention\.masked_bias$",
        r"rotary_emb\.inv_freq$",
    ]

    def __init__(self, config: GPTNeoXConfig, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, GPTNeoXConfig):
            raise ValueError(
                f"{type(self).__name__} wants a neox_hf.GPTNeoXConfig; found {type(config).__module__}."
                f"{type(config).__name__}. Convert it: neox_hf.GPTNeoXConfig.from_dict(config.to_dict())"
            )
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            initialize_matrix(module, self.config)
        else:
            super()._init_weights(module)  # norms to one and zero; rotary buffers


class GPTNeoXModel(GPTNeoXPreTrainedModel):
    """Token ids [B, S] to hidden states [B, S, H].

    topology: the tensor group that shares each layer; None is a process alone. Names of parameters do not depend on it,
    their shapes do (`neox_hf.parallel.shards_of`). Weights of a split model come from a checkpoint or from
    `draw_weights`: what its constructor draws is not a part of what the whole model's would.

    `forward` is `embed`, `run_layers`, `finish`. Between them hidden states are [B, S, H], replicated in the tensor
    group; but with `topology.sequence` and in training mode each rank has its part of the sequence, [B, S / tensor, H].

    graphs: runs the layers in training, where somebody has made it; see `layer_graphs.py`.

    Raises:
        TopologyError: the heads or intermediate_size do not divide by the tensor size.
    """

    graphs: LayerGraphs | None = None

    def __init__(self, config: GPTNeoXConfig, topology: Topology | None = None) -> None:
        super().__init__(config)
        self.kernels = config.kernels
        self.region = region = TensorRegion.of(topology)
        self.embed_in = vocabulary_embedding(config.vocab_size, config.hidden_size, region)
        self.emb_dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList([GPTNeoXLayer(config, index, region) for index in range(config.num_hidden_layers)])
        self.final_layer_norm = GPTNeoXLayerNorm(config, region)
        self.rotary_emb = GPTNeoXRotaryEmbedding(config)
        self.gradient_checkpointing = False
        logger.info(describe_choice(OPS, config.kernels))
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_in

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_in = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the stack.

        input_ids int64 [B, S], or inputs_embeds [B, S, H] in their place. attention_mask [B, S], 0 for padding.
        position_ids int64 [B, S]: where they restart, without attention_mask and past_key_values, documents are packed
        and do not see each other. use_cache makes a cache where past_key_values brings none.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds were given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            found = "neither" if input_ids is None else "both"
            raise ValueError(f"GPTNeoXModel wants one of input_ids and inputs_embeds; found {found}")
        hidden_states, past_key_values = self.run_layers(
            self.layers,
            self.embed(input_ids, inputs_embeds),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return BaseModelOutputWithPast(last_hidden_state=self.finish(hidden_states), past_key_values=past_key_values)

    # The parts of a forward pass, which pipeline stages call one by one.

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        """What the first layer reads [B, S, H], of token ids [B, S] or of embeddings that were looked up already.

        Raises:
            TopologyError: under sequence parallelism S does not divide by the tensor size.
        """
        region = self.region.in_mode(self.training)
        if inputs_embeds is None:
            embedded = _looked_up(self.embed_in, input_ids, self.config.tie_word_embeddings, self.kernels)
        else:
            embedded = region.scatter_sequence(inputs_embeds)
        with region.residual_random(embedded.device, self.emb_dropout.p):
            return self.emb_dropout(embedded)

    def run_layers(
        self, layers: Iterable[GPTNeoXLayer], hidden_states: Tensor, **given: Any
    ) -> tuple[Tensor, Cache | None]:
        """Hidden states [B, S, H] after `layers`, and the cache. given: other arguments as for `forward`."""
        plain = all(_is_default(*argument) for argument in given.items())
        if plain and self.graphs is not None and self.graphs.take(layers, hidden_states):
            return self.graphs(lambda states: self._run_layers(layers, states)[0], hidden_states), None
        return self._run_layers(layers, hidden_states, **given)

    def _run_layers(
        self,
        layers: Iterable[GPTNeoXLayer],
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Cache | None]:
        # Masks and angles, made once for all layers, read no values of it.
        whole = self.region.in_mode(self.training).with_whole_sequence(hidden_states)
        # From what the caller gave: transformers lets packed documents see each other as soon as a pass makes a cache,
        # which is what it does by default, in training too. Who brings a cache goes on in it, and has no documents.
        mask = causal_mask(self.config, whole, attention_mask, position_ids, past_key_values, self.kernels)
        documents = flash_documents(self.config, whole, attention_mask, position_ids, past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        position_embeddings = self.rotary_emb(whole, positions_or_default(position_ids, whole, past_key_values))
        for layer in layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids,
                layer_past=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **(documents | kwargs),
            )
        return hidden_states, past_key_values

    def finish(self, hidden_states: Tensor) -> Tensor:
        """What the head reads [B, S, H], the whole sequence on every rank, of the last layer's hidden states.

        It stands in the head's tensor region: what reads it must give partial gradients, as a split head does.
        """
        region = self.region.in_mode(self.training)
        return region.gather_sequence(self.final_layer_norm(region.enter(hidden_states)))


def _is_default(name: str, value: Any) -> bool:
    """Whether layers would do the same without this argument."""
    return value is None or name in FOR_THE_LOSS or (name == "use_cache" and value is False)


def positions_or_default(position_ids: Tensor | None, inputs_embeds: Tensor, past_key_values: Cache | None) -> Tensor:
    """The caller's positions, or [1, S] counting on from what the cache has seen."""
    if position_ids is not None:
        return position_ids
    seen = past_key_values.get_seq_length() if past_key_values is not None else 0
    return (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)


def _looked_up(module: nn.Module, input_ids: Tensor, shared: bool, kernels: str) -> Tensor:
    """The module's rows, by our op where that is the same as calling it."""
    if is_bare(module, VocabParallelEmbedding):
        return module.look_up(input_ids, shared=shared, kernels=kernels)
    plain = is_bare(module, nn.Embedding) and module.padding_idx is None and module.max_norm is None
    if not plain or module.sparse or module.scale_grad_by_freq:
        return module(input_ids)
    return embedding(input_ids, module.weight, shared=shared, backend=kernels)
