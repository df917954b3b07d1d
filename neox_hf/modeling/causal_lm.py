"""`GPTNeoXForCausalLM`: the model that pretraining trains and the Hub serves."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from neox_hf.kernels import IGNORE_INDEX, cross_entropy, linear_cross_entropy
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.model import GPTNeoXModel, GPTNeoXPreTrainedModel


class GPTNeoXForCausalLM(GPTNeoXPreTrainedModel, GenerationMixin):
    """A language-model head [V, H] on `GPTNeoXModel`. On disk the head is `embed_out.weight`."""

    _tied_weights_keys = {"lm_head.weight": "gpt_neox.embed_in.weight"}  # noqa: RUF012 - transformers wants plain dicts
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__(config)
        self.gpt_neox = GPTNeoXModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = partial(causal_lm_loss, kernels=config.kernels)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def summed_loss(self, hidden_states: Tensor, next_tokens: Tensor) -> Tensor:
        """Sum of the losses of next tokens int64 [B, S], -100 for none, given what `finish` returns [B, S, H].

        fp32; logits are never whole.
        """
        return linear_cross_entropy(
            hidden_states.flatten(0, 1), self.lm_head.weight, next_tokens.flatten(), backend=self.config.kernels
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> tuple | CausalLMOutputWithPast:
        """Logits [B, S, V] and, with labels, the mean loss.

        labels int64 [B, S]: the tokens themselves, shifted here; -100 counts for nothing. `shift_labels` among kwargs
        are the next tokens already and win. `num_items_in_batch` divides the summed loss where a step has more than
        this batch. logits_to_keep: how many of the last positions to project (0: all), or their indices.
        Other arguments: see `GPTNeoXModel`.
        """
        outputs = self.gpt_neox(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    *,
    kernels: str,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    **_: Any,
) -> Tensor:
    """`kernels.cross_entropy` in the signature of transformers' `loss_function`, which users may replace.

    A forward pass hands all its keyword arguments to the loss; those for attention and the like are not ours.
    """
    return cross_entropy(
        logits,
        labels,
        shift_labels=shift_labels,
        num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index,
        backend=kernels,
    )
