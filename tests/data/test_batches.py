"""The tensors of a batch, by hand."""

import numpy as np
import pytest
import torch

from neox_hf.data import StreamLoader
from neox_hf.data.batches import make_batch
from tests.data.naive import make_texts, settings_for, write_jsonl

SAMPLES = [np.array([5, 0, 7, 8, 0], np.int32), np.array([0, 0, 3, 0, 4], np.int32)]


def test_labels_are_the_next_tokens():
    batch = make_batch(SAMPLES, 0, document_mask=False, eod_mask_loss=False)
    assert set(batch) == {"input_ids", "labels", "shift_labels"}
    assert batch["input_ids"].tolist() == [[5, 0, 7, 8], [0, 0, 3, 0]]
    assert batch["shift_labels"].tolist() == [[0, 7, 8, 0], [0, 3, 0, 4]]
    assert batch["labels"] is batch["input_ids"]
    assert all(tensor.dtype == torch.int64 and tensor.is_contiguous() for tensor in batch.values())


def test_no_loss_on_the_first_token_after_an_end():
    batch = make_batch(SAMPLES, 0, document_mask=False, eod_mask_loss=True)
    assert batch["shift_labels"].tolist() == [[0, -100, 8, 0], [-100, -100, 0, -100]]


def test_masking_the_loss_leaves_the_tokens_of_a_single_row():
    batch = make_batch(SAMPLES[:1], 0, document_mask=False, eod_mask_loss=True)
    assert batch["input_ids"].tolist() == [[5, 0, 7, 8]]
    assert batch["shift_labels"].tolist() == [[0, -100, 8, 0]]


def test_positions_restart_after_an_end():
    batch = make_batch(SAMPLES, 0, document_mask=True, eod_mask_loss=False)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 0, 0, 1]]


def test_pinned_batches_keep_one_tensor_one(tmp_path, stream_over, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    settings = settings_for(write_jsonl(tmp_path / "a.jsonl", make_texts(9)))
    batch = next(iter(StreamLoader(stream_over(settings), 3, pin_memory=True)))
    assert batch["labels"] is batch["input_ids"]
    assert batch["labels"] is not pinned[0]


@pytest.mark.parametrize("mask", [False, True])
def test_the_loader_follows_the_settings(tmp_path, stream_over, mask):
    settings = settings_for(write_jsonl(tmp_path / "a.jsonl", make_texts(9)), document_mask=mask, eod_mask_loss=mask)
    batch = next(iter(StreamLoader(stream_over(settings), 3)))
    assert ("position_ids" in batch) == mask
    assert ((batch["shift_labels"] == -100).any()) == mask
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(3, 32)}
