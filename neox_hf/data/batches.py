"""Samples to the batch dict that models take. See docs/architecture.md, "Names on the wire"."""

from collections.abc import Sequence

import numpy as np
import torch

IGNORED = -100


def make_batch(
    samples: Sequence[np.ndarray], end_of_document: int, *, document_mask: bool, eod_mask_loss: bool
) -> dict[str, torch.Tensor]:
    """B samples of S + 1 tokens become tensors int64 [B, S].

    input_ids; labels, the same tensor; shift_labels, the next token at each position, with `eod_mask_loss` IGNORED
    where the input is an end-of-document token (as GPT-NeoX masks it); with `document_mask` position_ids, which
    restart after each such token.
    """
    tokens = torch.from_numpy(np.stack(samples).astype(np.int64))
    input_ids = tokens[:, :-1].contiguous()
    shift_labels = tokens[:, 1:].contiguous()
    ends = input_ids == end_of_document
    if eod_mask_loss:
        shift_labels = shift_labels.masked_fill(ends, IGNORED)  # in one row it shares its memory with input_ids
    batch = {"input_ids": input_ids, "labels": input_ids, "shift_labels": shift_labels}
    if document_mask:
        batch["position_ids"] = positions_in_documents(ends)
    return batch


def positions_in_documents(ends: torch.Tensor) -> torch.Tensor:
    """Distance int64 [B, S] of each place from its document's start, or from the sample's.

    ends: bool [B, S], last token of a document.
    """
    places = torch.arange(ends.shape[1]).expand(ends.shape)
    starts = torch.zeros_like(places)
    starts[:, 1:] = torch.where(ends[:, :-1], places[:, 1:], 0)
    return places - starts.cummax(dim=1).values
