"""Heads other than the language model's: a class per sequence, a class per token, a span of text."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple, logging

from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.model import GPTNeoXModel, GPTNeoXPreTrainedModel

logger = logging.get_logger(__name__)


class GPTNeoXForSequenceClassification(GPTNeoXPreTrainedModel):
    """One class, or one number, per sequence, read from its last token that is not padding."""

    # Not all of its losses can be divided by a number from outside. So HF's Trainer does not pass one, and divides the
    # loss by the micro-batches of a step; of `**kwargs` in `forward` it would conclude that we do.
    accepts_loss_kwargs = False

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.gpt_neox = GPTNeoXModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

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
        **kwargs: Any,
    ) -> tuple | SequenceClassifierOutputWithPast:
        """Scores [B, num_labels]; labels [B] (classes, or numbers for regression).

        Raises:
            ValueError: several sequences, and no padding token to find their ends by.
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
        scores = self.score(outputs.last_hidden_state)
        rows = torch.arange(scores.shape[0], device=scores.device)
        pooled = scores[rows, self.last_tokens(input_ids, scores)]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=scores, labels=labels, pooled_logits=pooled, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=pooled,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def last_tokens(self, input_ids: Tensor | None, scores: Tensor) -> Tensor | int:
        """Index of each row's last token that is not padding [B]; the very last where that cannot be told."""
        padding = self.config.pad_token_id
        if padding is None:
            if scores.shape[0] != 1:
                raise ValueError(
                    f"a batch of {scores.shape[0]} sequences needs config.pad_token_id to find where each one ends; "
                    "found None. Set it, or pass one sequence at a time"
                )
            return -1
        if input_ids is None:
            logger.warning_once("inputs_embeds show no padding: the last position of every row is classified")
            return -1
        kept = (input_ids != padding).to(device=scores.device, dtype=torch.int32)
        return (kept * torch.arange(kept.shape[1], device=kept.device, dtype=torch.int32)).argmax(dim=-1)


class GPTNeoXForTokenClassification(GPTNeoXPreTrainedModel):
    """One class per token."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.gpt_neox = GPTNeoXModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> tuple | TokenClassifierOutput:
        """Scores [B, S, num_labels]; labels int64 [B, S], not shifted, -100 for none. `num_items_in_batch` divides the
        summed loss where a step has more than this batch.
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
        scores = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            # HF's Trainer takes this loss for one that is divided by the labels of the whole step already.
            counted = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(scores, labels, self.config, **counted)
        return TokenClassifierOutput(
            loss=loss, logits=scores, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class GPTNeoXForQuestionAnswering(GPTNeoXPreTrainedModel):
    """Start and end of the answer within the text."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.gpt_neox = GPTNeoXModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple | QuestionAnsweringModelOutput:
        """Scores of every position as start and as end, each [B, S]; true positions int64 [B]."""
        outputs = self.gpt_neox(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        starts, ends = (scores.contiguous() for scores in self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(starts, ends, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=starts,
            end_logits=ends,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
