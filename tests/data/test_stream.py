"""The sample sequence against a naive program's, for every rule by which documents reach streams."""

import random
from collections import Counter
from dataclasses import replace
from itertools import islice

import pyarrow
import pyarrow.parquet
import pytest

from neox_hf.data import SourceSettings, TokenStream, sources
from neox_hf.data.hashing import permuted
from neox_hf.errors import DataError
from tests.data.naive import (
    END,
    dealt_epochs,
    first_samples,
    make_texts,
    naive_samples,
    owned_epochs,
    settings_for,
    write_jsonl,
)

COUNT = 60


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize(("documents", "streams"), [(11, 4), (12, 4), (5, 16), (1, 6), (30, 1)])
def test_single_documents_are_dealt_to_streams(tmp_path, stream_over, documents, streams, seed):
    texts = make_texts(documents)
    write_jsonl(tmp_path / "a.jsonl", texts[: documents // 2 + 1])
    if texts[documents // 2 + 1 :]:
        write_jsonl(tmp_path / "b.jsonl", texts[documents // 2 + 1 :])
    settings = settings_for(tmp_path, streams=streams, shuffle=seed is not None, seed=seed or 0)
    wanted = naive_samples(owned_epochs(texts, streams, seed), streams, 32, COUNT)
    assert first_samples(stream_over(settings), COUNT) == wanted


@pytest.mark.parametrize(("rows", "streams"), [((9, 4), 4), ((1,), 6), ((2, 3), 16), ((40,), 1)])
def test_rows_of_few_compressed_files_are_dealt_to_streams(tmp_path, stream_over, rows, streams):
    files = [make_texts(count, seed=number) for number, count in enumerate(rows)]
    for number, texts in enumerate(files):
        write_jsonl(tmp_path / f"{number}.jsonl.gz", texts)
    # Fewer files than streams: one stream more than files is the least that deals rows.
    streams = max(streams, len(files) + 1)
    wanted = naive_samples(dealt_epochs(files, streams), streams, 32, COUNT)
    assert first_samples(stream_over(settings_for(tmp_path, streams=streams)), COUNT) == wanted


def test_rows_of_parquet_row_groups_are_dealt_to_streams(tmp_path, stream_over):
    texts = make_texts(17)
    table = pyarrow.table({"text": texts, "other": list(range(17))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    wanted = naive_samples(dealt_epochs([texts[:10], texts[10:]], 4), 4, 32, COUNT)
    assert first_samples(stream_over(settings_for(tmp_path)), COUNT) == wanted


def test_streams_own_whole_compressed_files_where_there_are_enough(tmp_path, stream_over):
    files = [make_texts(3, seed=number) for number in range(5)]
    for number, texts in enumerate(files):
        write_jsonl(tmp_path / f"{number}.jsonl.gz", texts)

    def documents(epoch):
        return [((number - epoch) % 4, text) for number, texts in enumerate(files) for text in texts]

    wanted = naive_samples(documents, 4, 32, COUNT)
    assert first_samples(stream_over(settings_for(tmp_path)), COUNT) == wanted


@pytest.mark.parametrize("shuffle", [False, True])
def test_plain_and_compressed_files_of_one_source_are_read_equally_often(tmp_path, stream_over, shuffle):
    plain, packed = ([f"<{kind}{number}>" for number in range(60)] for kind in "ab")
    write_jsonl(tmp_path / "a.jsonl", plain)
    write_jsonl(tmp_path / "b.jsonl.gz", packed)
    settings = settings_for(tmp_path, streams=4, seq_length=12, shuffle=shuffle)
    samples = first_samples(stream_over(settings), 64)  # an epoch, and some tokens more
    by_stream = [[token for sample in samples[stream::4] for token in sample[:-1]] for stream in range(4)]
    read = Counter(
        text
        for tokens in by_stream
        for text in "".join("|" if token == END else chr(token) for token in tokens).split("|")
    )
    shares = [sum(read[text] for text in texts) for texts in (plain, packed)]
    assert abs(shares[0] - shares[1]) < 0.2 * sum(shares)
    assert max(read.values()) <= 2


def test_files_that_are_shares_of_unequal_size_are_told(tmp_path, stream_over, caplog):
    for number, documents in enumerate([3, 3, 3, 3, 400]):
        texts = [f"{number} {random.Random(n).random()}" for n in range(documents)]
        write_jsonl(tmp_path / f"{number}.jsonl.gz", texts)
    stream_over(settings_for(tmp_path, streams=8))
    assert not caplog.records  # their rows are dealt
    stream_over(settings_for(tmp_path, streams=4))
    assert "4.jsonl.gz is 5 times as large as the mean: its documents will be read less often" in caplog.text


def test_row_groups_of_one_size_are_no_unequal_shares(tmp_path, stream_over, caplog):
    for number, rows in enumerate([2, 2, 2, 2, 2, 80]):
        table = pyarrow.table({"text": [f"{number}.{row}" * 500 for row in range(rows)]})
        pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=2)
    stream_over(settings_for(tmp_path, streams=4))
    assert not caplog.records


def test_a_large_file_is_read_in_spans_without_an_index(tmp_path, stream_over, monkeypatch):
    monkeypatch.setattr(sources, "INDEXED_BYTES", 0)
    monkeypatch.setattr(sources, "LEAST_SPAN_BYTES", 200)
    texts = make_texts(40)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    starts, offset = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        starts.append(offset // 200)
        offset += len(line)

    def documents(epoch):
        return [((span - epoch) % 4, text) for span, text in zip(starts, texts, strict=True)]

    wanted = naive_samples(documents, 4, 32, COUNT)
    assert first_samples(stream_over(settings_for(tmp_path)), COUNT) == wanted


def test_each_epoch_gives_every_document_once(tmp_path, stream_over):
    """With one stream the order of documents can be read off the tokens."""
    texts = [f"<{number}>" for number in range(10)]
    settings = settings_for(write_jsonl(tmp_path / "a.jsonl", texts), streams=1, shuffle=True)
    tokens = [token for sample in first_samples(stream_over(settings), 4) for token in sample[:-1]]
    read = "".join("|" if token == END else chr(token) for token in tokens).split("|")[:30]
    epochs = [read[:10], read[10:20], read[20:]]
    assert all(sorted(epoch) == sorted(texts) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] == [texts[permuted(place, 10, settings.seed, 0, 0)] for place in range(10)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("size", [2, 4, 6])
def test_every_data_size_reads_the_same_global_sequence(tmp_path, stream_over, size, suffix):
    write_jsonl(tmp_path / f"a{suffix}", make_texts(29))
    settings = settings_for(tmp_path, streams=12, shuffle=True)
    whole = first_samples(stream_over(settings), 48)
    ranks = [first_samples(stream_over(settings, rank, size), 48 // size) for rank in range(size)]
    assert [ranks[number % size][number // size] for number in range(48)] == whole


def test_sources_keep_their_weights_and_their_own_order(tmp_path, stream_over):
    left, right = make_texts(9, seed=1), make_texts(13, seed=2)
    paths = [write_jsonl(tmp_path / "left.jsonl", left), write_jsonl(tmp_path / "right.jsonl", right)]
    settings = settings_for(streams=2)
    settings = replace(
        settings, sources=[SourceSettings(path=str(p), weight=w) for p, w in zip(paths, (1.0, 3.0), strict=True)]
    )
    samples = list(islice(stream_over(settings), 200))
    assert abs(Counter(sample.lane[0] for sample in samples)[0] - 50) <= 2
    for number, texts in enumerate((left, right)):
        for stream in range(2):
            found = [sample.tokens.tolist() for sample in samples if sample.lane == (number, stream)]
            wanted = naive_samples(owned_epochs(texts, 2, None), 2, 32, 2 * len(found))[stream::2]
            assert found == wanted


def test_train_and_eval_split_a_source_between_them(tmp_path, tokenizer):
    texts = [f"<{number}>" for number in range(200)]
    settings = settings_for(write_jsonl(tmp_path / "a.jsonl", texts), streams=1, eval_fraction=0.25)

    def read(split):
        stream = TokenStream(settings, tokenizer, split=split)
        tokens = []
        for sample in stream:
            tokens += sample.tokens[:-1].tolist()
            if sample.next.epoch:
                return set("".join("|" if token == END else chr(token) for token in tokens).split("|")[:-1])

    train, held_out = read("train"), read("eval")
    assert not {name for name in train & held_out if name.endswith(">")}
    assert {name for name in train | held_out if name.endswith(">")} >= set(texts)
    assert 25 < len(held_out) < 80


@pytest.mark.parametrize(
    ("changes", "rank", "message"),
    [
        ({"streams": 5}, (0, 2), "data-parallel size 2 does not divide data.streams=5; .* such as 6"),
        ({"streams": 0}, (0, 1), "data.streams=0 must be at least 1"),
        ({"seq_length": 0}, (0, 1), "data.seq_length=0 must be at least 1"),
        ({"eval_fraction": 1.0}, (0, 1), "data.eval_fraction=1.0 must be at least 0 and less than 1"),
        ({"sources": []}, (0, 1), "data.sources is empty"),
    ],
)
def test_settings_that_cannot_be_met(tmp_path, stream_over, changes, rank, message):
    settings = settings_for(write_jsonl(tmp_path / "a.jsonl", ["x"]), **changes)
    with pytest.raises(DataError, match=message):
        stream_over(settings, *rank)


def test_the_eval_split_is_one_stream_and_may_be_absent(tmp_path, tokenizer):
    settings = settings_for(write_jsonl(tmp_path / "a.jsonl", ["x"]))
    with pytest.raises(DataError, match=r"nothing to evaluate on: set data.eval_sources, or data.eval_fraction"):
        TokenStream(settings, tokenizer, split="eval")
    with pytest.raises(DataError, match=r"does not divide the one stream of the eval split .*evaluation_batches"):
        TokenStream(replace(settings, eval_fraction=0.5), tokenizer, split="eval", data_size=2)


def test_token_ids_the_model_has_no_row_for(tmp_path, stream_over):
    path = write_jsonl(tmp_path / "a.jsonl", ["abc", "aböc"])
    with pytest.raises(DataError, match=r"end-of-document token .* has id 256, at or over vocab_size=256"):
        stream_over(settings_for(path), vocab_size=256)
    stream = stream_over(settings_for(path))
    stream.encoder.vocab_size = 190  # smaller than the bytes of ö
    with pytest.raises(DataError, match=r"a.jsonl:2: token 2 of the document has id 195 \('Ã'\), outside \[0, vocab_"):
        first_samples(stream, 1)
