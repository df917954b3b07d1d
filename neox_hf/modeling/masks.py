"""Which positions may look at which: nothing where `is_causal` says it all, spans of keys, or a mask."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils.import_utils import is_tracing

from neox_hf.kernels import takes_documents
from neox_hf.kernels.document_spans import DocumentSpans, spans_of_padding, spans_of_positions
from neox_hf.modeling.configuration import GPTNeoXConfig


def causal_mask(
    config: GPTNeoXConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | BlockMask | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    kernels: str,
) -> Tensor | BlockMask | DocumentSpans | None:
    """The mask in the form that the attention implementation wants, or None.

    attention_mask: [B, S] of 0 and 1, or 4-D and ready, as the caller gave it. position_ids: as the *caller* gave them,
    so None says that no position restarts; where they do and there is no cache, documents are packed and do not see
    each other. past_key_values: as the caller gave it. kernels: the model's choice; a configuration of transformers'
    has none.
    """
    if is_causal_enough(config, inputs_embeds.shape[1], attention_mask, position_ids, past_key_values):
        return None
    if takes_spans(config, inputs_embeds, attention_mask, past_key_values, kernels):
        return _spans(inputs_embeds, attention_mask, position_ids)
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
    )


def is_causal_enough(
    config: GPTNeoXConfig,
    length: int,
    attention_mask: Tensor | BlockMask | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
) -> bool:
    """Whether a causal mask that is never made will do, as SDPA's `is_causal`; decided without reading a tensor.

    transformers reads tensors to decide, so while `torch.compile` traces it declines and builds [B, 1, S, S]; and in
    eager mode it waits for the device in every forward pass.
    """
    if config._attn_implementation not in ("sdpa", "eager") or not getattr(config, "is_causal", True):
        return False
    if attention_mask is not None:
        return False
    if past_key_values is None:
        return position_ids is None
    return _grows(past_key_values) and (length == 1 or past_key_values.get_seq_length() == 0)


def _grows(cache: Cache) -> bool:
    """Whether its keys are those that it was given and no others: neither room for more, nor a window of them."""
    return not (cache.is_compileable or any(cache.is_sliding))


def takes_spans(
    config: GPTNeoXConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | BlockMask | None,
    cache: Cache | None,
    kernels: str,
) -> bool:
    """Whether a kernel takes over from SDPA, which would want a mask [B, 1, S, S]: in passes over whole samples, the
    first one into a cache among them. Where attention drops weights, `document_attention` has SDPA do it after all."""
    if config._attn_implementation != "sdpa" or not getattr(config, "is_causal", True):
        return False
    of_tokens = isinstance(attention_mask, Tensor) and attention_mask.shape == inputs_embeds.shape[:2]
    if cache is None:
        whole = attention_mask is None or of_tokens
    else:
        whole = of_tokens and _grows(cache) and cache.get_seq_length() == 0
    return whole and takes_documents(kernels, inputs_embeds, config.hidden_size // config.num_attention_heads)


def _spans(inputs_embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> DocumentSpans | None:
    """As transformers reads them: positions tell documents apart where there is no attention mask, and the host waits
    for values of one where nobody traces or captures."""
    if attention_mask is not None:
        kept = attention_mask.to(inputs_embeds.device) != 0
        return spans_of_padding(kept, may_wait=not (is_tracing(kept) or kept.is_meta))
    return spans_of_positions(position_ids.to(inputs_embeds.device).expand(inputs_embeds.shape[0], -1))


def flash_documents(
    config: GPTNeoXConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | BlockMask | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
) -> dict[str, Any]:
    """Bounds of packed documents for flash attention, which takes no mask; empty where there is nothing to say.

    transformers finds the documents itself in a batch of one row, and only there: in larger ones they would see each
    other. Arguments as for `causal_mask`.
    """
    rows = inputs_embeds.shape[0]
    packed = attention_mask is None and past_key_values is None and position_ids is not None and rows > 1
    if not packed or not str(config._attn_implementation).startswith("flash_attention"):
        return {}
    position_ids = position_ids.expand(rows, -1)
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=-1) != 1
    first_tokens = starts.flatten().nonzero().flatten()
    if first_tokens.numel() == rows:
        return {}
    bounds = F.pad(first_tokens, (0, 1), value=position_ids.numel()).to(torch.int32)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
