"""`GPTNeoXForCausalLM`: the model that pretraining trains and the Hub serves."""

from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from neox_hf.kernels import IGNORE_INDEX, Backend, cross_entropy, linear_cross_entropy
from neox_hf.kernels.cross_entropy import labels_of_next_tokens, number_of_labels
from neox_hf.modeling.bare import is_bare
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.model import GPTNeoXModel, GPTNeoXPreTrainedModel
from neox_hf.parallel import TensorRegion, Topology, VocabParallelHead, vocabulary_head


class GPTNeoXForCausalLM(GPTNeoXPreTrainedModel, GenerationMixin):
    """A language-model head [V, H] on `GPTNeoXModel`. On disk the head is `embed_out.weight`.

    z_loss: weight of each token's squared log-sum-exp in the loss of training (`regularise_logits`).
    topology: see `GPTNeoXModel`. Every rank of a tensor group is called with the same batch, in lockstep, and gets the
    same logits or loss, so `generate` works on all of them at once, given equal seeds.
    """

    _tied_weights_keys = {"lm_head.weight": "gpt_neox.embed_in.weight"}  # noqa: RUF012 - transformers wants plain dicts
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012
    skip_logits_in_training = False
    z_loss = 0.0

    def __init__(self, config: GPTNeoXConfig, topology: Topology | None = None) -> None:
        super().__init__(config)
        self.region = TensorRegion.of(topology)
        self.gpt_neox = GPTNeoXModel(config, topology)
        self.lm_head = vocabulary_head(config.hidden_size, config.vocab_size, self.region)
        self.choose_kernels(config.kernels)
        self.post_init()

    def choose_kernels(self, kernels: Backend) -> None:
        """Who computes the loss, unless it has been replaced."""
        self.kernels = kernels
        if has_the_usual_loss(self):
            self.loss_function = CausalLMLoss(kernels)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def summed_loss(
        self,
        hidden_states: Tensor,
        next_tokens: Tensor,
        head: Tensor | None = None,
        upstream: Tensor | float | None = None,
        accumulate_into: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> Tensor:
        """Sum of the losses of next tokens int64 [B, S], given what `finish` returns [B, S, H].

        A token of `ignore_index` counts for nothing. fp32, the same on every rank of a tensor group; logits are never
        whole. head: the head's weight, if a view of it must be what gets the gradient. upstream: what the sum is about
        to be multiplied by. accumulate_into: where the head's gradient is added at once. Both: see
        `linear_cross_entropy`.
        """
        return linear_cross_entropy(
            hidden_states.flatten(0, 1),
            self.lm_head.weight if head is None else head,
            next_tokens.flatten(),
            ignore_index=ignore_index,
            z_loss=self.z_loss if self.training else 0.0,
            upstream=upstream,
            accumulate_into=accumulate_into,
            backend=self.kernels,
            **self.words_of_this_rank(),
        )

    def _fuses_head_and_loss(self) -> bool:
        """Whether `loss_without_logits` is what the head and the loss would give."""
        return isinstance(self.loss_function, CausalLMLoss) and is_bare(self.lm_head, nn.Linear, VocabParallelHead)

    def words_of_this_rank(self) -> dict[str, Any]:
        """How `linear_cross_entropy` has to read the head where its vocabulary is split."""
        region = self.region
        if region.size == 1:
            return {}
        shard = self.lm_head.shard
        return {
            "first_row": shard.start,
            "rows": shard.length,
            "all_max": region.all_max_,
            "all_sum": region.all_sum_,
        }

    def loss_without_logits(
        self,
        hidden_states: Tensor,
        labels: Tensor | None,
        *,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE_INDEX,
        loss_factor: float = 1.0,
        **_: Any,
    ) -> Tensor:
        """The loss of `CausalLMLoss`, from what `finish` returns [B, S, H]; loss_factor: see `forward`."""
        next_tokens = labels_of_next_tokens(labels, shift_labels, ignore_index).to(hidden_states.device)
        count = number_of_labels(next_tokens, num_items_in_batch, ignore_index)
        upstream = loss_factor / count
        return self.summed_loss(hidden_states, next_tokens, upstream=upstream, ignore_index=ignore_index) / count

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
        skip_logits: bool | None = None,
        loss_factor: float = 1.0,
        **kwargs: Any,
    ) -> tuple | CausalLMOutputWithPast:
        """Logits [B, S, V] and, with labels, the mean loss. A split vocabulary has no logits where there are labels,
        unless the loss has been replaced.

        labels int64 [B, S]: the tokens themselves, shifted here; -100 counts for nothing. `shift_labels` among kwargs
        are the next tokens already and win. `num_items_in_batch` divides the summed loss where a step has more than
        this batch. logits_to_keep: how many of the last positions to project (0: all), or their indices. skip_logits:
        the loss is all that is wanted; logits are None and never exist as a whole, unless the loss has been replaced or
        something is attached to the head. None is `skip_logits_in_training` while training, else False. loss_factor:
        what the caller is about to multiply that loss by, as HF's trainer does by its replicas; gradients that are made
        with the loss hold it then, and need not be put right. Other arguments: see `GPTNeoXModel`.
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
        hidden_states, logits, loss = outputs.last_hidden_state, None, None
        wants_loss = labels is not None or kwargs.get("shift_labels") is not None
        if skip_logits is None:
            skip_logits = self.training and self.skip_logits_in_training
        if wants_loss and (skip_logits or self.region.size > 1) and self._fuses_head_and_loss():
            loss = self.loss_without_logits(hidden_states, labels, loss_factor=loss_factor, **kwargs)
        else:
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        if wants_loss and loss is None:
            if self.z_loss and self.training:
                kwargs["z_loss"] = self.z_loss
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class CausalLMLoss:
    """`kernels.cross_entropy` in the signature of transformers' `loss_function`, which users may replace.

    A class, and no partial function: a compiler makes a partial one anew, and knows this one again.
    """

    def __init__(self, kernels: Backend) -> None:
        self.kernels = kernels

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        *,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE_INDEX,
        z_loss: float = 0.0,
        **_: Any,
    ) -> Tensor:
        """A forward pass hands all its keyword arguments to the loss; those for attention and the like are not ours."""
        return cross_entropy(
            logits,
            labels,
            shift_labels=shift_labels,
            num_items_in_batch=num_items_in_batch,
            ignore_index=ignore_index,
            z_loss=z_loss,
            backend=self.kernels,
        )


def has_the_usual_loss(model: PreTrainedModel) -> bool:
    """Whether nobody chose another one, by a function or by the name of one of transformers'."""
    chosen = getattr(model, "_loss_function", None)
    return isinstance(chosen, CausalLMLoss) if chosen is not None else model.loss_function is ForCausalLMLoss


def regularise_logits(model: nn.Module, z_loss: float) -> None:
    """Have the loss of training hold z_loss times each token's squared log-sum-exp, which keeps logits from drifting.

    Source: PaLM, arXiv 2204.02311, section 5, where the weight is 1e-4.

    Raises:
        ValueError: nothing of the model has this loss, or it has been replaced.
    """
    owners = [module for module in model.modules() if hasattr(type(module), "z_loss")]
    if not owners or not all(has_the_usual_loss(owner) for owner in owners):
        why = "its loss_function has been replaced" if owners else "it is no causal language model of neox_hf"
        raise ValueError(f"z_loss={z_loss} cannot be added to the loss of this {type(model).__name__}: {why}")
    for owner in owners:
        owner.z_loss = z_loss
