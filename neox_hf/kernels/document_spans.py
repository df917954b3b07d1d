"""Which keys a token sees where documents are packed or rows are padded: a span of them, which needs no mask.

A token sees itself and what comes before it in its document. So each query sees the keys from one place up to another,
and each key is seen by the queries from its own place up to another. Padding is seen by nobody; what stands in its
place sees the tokens before it, as in transformers' masks.

Shapes: B samples, S tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class DocumentSpans(NamedTuple):
    """Places int32 [B, S], of which `first` and `behind` never fall along a row.

    first, behind: a query sees the keys from the one to before the other. end: a key is seen by the queries from its
    own place to before that one. kept: bool [B, S], False for keys that are seen by nobody though spans hold them;
    None: there are no such.
    """

    first: Tensor
    behind: Tensor
    end: Tensor
    kept: Tensor | None = None


def spans_of_positions(position_ids: Tensor) -> DocumentSpans:
    """Of documents, one beginning wherever positions [B, S] do not go on by one."""
    length = position_ids.shape[-1]
    begins = F.pad(position_ids.diff(dim=-1) != 1, (1, 0))
    place = torch.arange(length, dtype=torch.int32, device=begins.device)
    first = torch.where(begins, place, 0).cummax(-1).values
    next_begin = torch.where(begins, place, length)[:, 1:].flip(-1).cummin(-1).values.flip(-1)
    end = F.pad(next_begin, (0, 1), value=length)[:, :length]
    return DocumentSpans(first, (place + 1).expand_as(first).contiguous(), end)


def spans_of_padding(kept: Tensor, *, may_wait: bool = True) -> DocumentSpans | None:
    """Of rows of tokens, kept bool [B, S], and padding; None where there is none.

    Padding before the first token and after the last lies outside of all spans. Whether that is all, and whether there
    is any, the host learns by waiting for the device; where it may not (`may_wait`), spans are made for the worst case.
    """
    length, kept = kept.shape[-1], kept.contiguous()
    before, after = kept.cumsum(-1) == 0, kept.flip(-1).cumsum(-1).flip(-1) == 0
    place = torch.arange(length, dtype=torch.int32, device=kept.device)
    first = before.sum(-1, keepdim=True, dtype=torch.int32).expand(-1, length).contiguous()
    behind = torch.minimum(place + 1, length - after.sum(-1, keepdim=True, dtype=torch.int32))
    outside = before | after
    spans = DocumentSpans(first, behind, torch.where(outside, place, length))
    if not may_wait:
        return spans._replace(kept=kept)
    any_outside, any_between = torch.stack((outside.any(), (~(kept | outside)).any())).tolist()
    if any_between:
        return spans._replace(kept=kept)
    return spans if any_outside else None
