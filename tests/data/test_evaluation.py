"""The evaluation set is the same at every data size, and whole."""

import json
from dataclasses import replace

import pytest
import torch

from neox_hf.data import SourceSettings, TokenStream, evaluation_batches
from neox_hf.errors import DataError
from tests.data.naive import first_samples, make_texts, settings_for, write_jsonl


@pytest.fixture
def settings(tmp_path):
    return settings_for(
        write_jsonl(tmp_path / "a.jsonl", make_texts(80)), eval_fraction=0.3, eval_samples=12, shuffle=True
    )


@pytest.mark.parametrize(("size", "batch_size"), [(1, 1), (1, 4), (2, 3), (4, 3), (3, 2)])
def test_the_set_does_not_depend_on_the_layout(settings, tokenizer, size, batch_size):
    ranks = [
        evaluation_batches(settings, tokenizer, batch_size=batch_size, data_rank=rank, data_size=size)
        for rank in range(size)
    ]
    assert {len(batches) for batches in ranks} == {12 // (size * batch_size)}
    rows = [torch.cat([batch["input_ids"] for batch in batches]).tolist() for batches in ranks]
    found = [rows[number % size][number // size] for number in range(12)]
    wanted = first_samples(TokenStream(settings, tokenizer, split="eval"), 12)
    assert found == [sample[:-1] for sample in wanted]


def test_it_can_be_iterated_again_and_indexed(settings, tokenizer):
    batches = evaluation_batches(settings, tokenizer, batch_size=4)
    first, second = ([batch["shift_labels"] for batch in batches] for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    with pytest.raises(IndexError, match=r"batch 3 of 3"):
        batches[3]


def test_eval_sources_are_read_whole(settings, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "eval.jsonl", ["e" * 200, "f" * 300])
    settings = replace(settings, eval_sources=[SourceSettings(path=str(path))])
    (batch,) = evaluation_batches(settings, tokenizer, batch_size=12)
    assert set(batch["input_ids"].unique().tolist()) == {ord("e"), ord("f"), 256}


def test_bad_rows_are_counted_and_kept_by_the_first_rank_alone(tokenizer, tmp_path):
    (tmp_path / "data").mkdir()
    path = write_jsonl(tmp_path / "data" / "a.jsonl", ["e" * 200, "", "f" * 400])
    path.with_name("empty.jsonl").touch()
    settings = settings_for(path.parent, eval_samples=12, bad_rows="quarantine")
    settings = replace(settings, eval_sources=settings.sources)
    kept = tmp_path / "quarantine.jsonl"
    counts = [
        evaluation_batches(settings, tokenizer, batch_size=2, data_rank=rank, data_size=2, quarantine=kept).bad_rows
        for rank in (1, 0)
    ]
    assert counts == [{}, {"empty_text": 1, "empty_file": 1}]
    kinds = [json.loads(line)["kind"] for line in kept.read_text().splitlines()]
    assert sorted(kinds) == ["empty_file", "empty_text"]


@pytest.mark.parametrize("masked", [False, True])
def test_batches_have_equally_many_labels_unless_ends_of_documents_are_masked(settings, tokenizer, masked):
    batches = evaluation_batches(replace(settings, eod_mask_loss=masked), tokenizer, batch_size=1)
    labels = {int((batch["shift_labels"] != -100).sum()) for batch in batches}
    assert (len(labels) > 1) if masked else (labels == {settings.seq_length})


@pytest.mark.parametrize(
    ("samples", "batch_size", "size", "nearest"),
    [(12, 5, 1, "10 or 15"), (12, 4, 2, "8 or 16"), (3, 4, 1, "4"), (0, 4, 2, "8")],
)
def test_a_set_that_cannot_be_shared_out(settings, tokenizer, samples, batch_size, size, nearest):
    settings = replace(settings, eval_samples=samples)
    with pytest.raises(DataError, match=f"eval_samples={samples} cannot be shared out: .*; set it to {nearest}$"):
        evaluation_batches(settings, tokenizer, batch_size=batch_size, data_size=size)


def test_a_set_larger_than_the_split(settings, tokenizer):
    settings = replace(settings, eval_samples=600)
    with pytest.raises(DataError, match=r"holds only \d\d sample\(s\) of 32 tokens, data.eval_samples asks for 600"):
        evaluation_batches(settings, tokenizer, batch_size=1)


def test_a_split_without_documents(tokenizer, tmp_path):
    settings = settings_for(write_jsonl(tmp_path / "a.jsonl", ["one"]), eval_fraction=0.01)
    with pytest.raises(DataError, match=r"has no document for the eval split in .*or another data.eval_fraction"):
        evaluation_batches(settings, tokenizer, batch_size=1)
