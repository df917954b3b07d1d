"""Tokenizers are fast HF tokenizers: lossless, saved as they are, and found again."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from neox_hf.data import TokenizerSettings, build_tokenizer, tokenization, tokenizer_corpus
from neox_hf.data.assignment import Cursor
from neox_hf.data.documents import Document
from neox_hf.data.encoding import PIECE_CHARACTERS, DocumentEncoder, text_pieces, tokenizer_fingerprint
from neox_hf.data.tokenizer_corpus import TokenizerCorpus
from neox_hf.errors import DataError
from tests.data.naive import END, make_texts, settings_for, write_jsonl

HARD = "Naïve\t«test» \r\n\n  日本語 🙂 \x00 <0x41> Ġ end "


@pytest.fixture
def data(tmp_path):
    return settings_for(write_jsonl(tmp_path / "a.jsonl", [*make_texts(50), "Naïve test"]))


def settings(kind, **changes):
    return TokenizerSettings(kind=kind, **changes)


@pytest.mark.parametrize("kind", ["byte", "char", "trained"])
def test_every_text_survives_and_stock_transformers_loads_the_same_tokenizer(tmp_path, data, kind):
    ours = build_tokenizer(settings(kind, vocab_size=None if kind == "byte" else 300), data, tmp_path / "built")
    ours.save_pretrained(tmp_path / "saved")
    stock = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert isinstance(ours, PreTrainedTokenizerFast)
    for text in (HARD, *make_texts(5)):
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == text
        assert stock(text, add_special_tokens=False)["input_ids"] == ids
    assert ours.convert_ids_to_tokens(ours.eos_token_id) == "<|endoftext|>" == stock.eos_token
    assert tokenizer_fingerprint(ours) == tokenizer_fingerprint(stock)
    assert len(ours) <= 300


def test_byte_ids_are_the_bytes(tokenizer):
    assert tokenizer(HARD)["input_ids"] == list(HARD.encode())
    assert (len(tokenizer), tokenizer.eos_token_id) == (257, 256)


def test_a_character_has_one_token_and_a_strange_one_its_bytes(tmp_path, data):
    chars = build_tokenizer(settings("char"), data, tmp_path / "t")
    assert len(chars("Naïve test")["input_ids"]) == 10
    assert len(chars("日")["input_ids"]) == 3
    small = build_tokenizer(settings("char", vocab_size=259), data, tmp_path / "s")
    assert len(small) == 259


@pytest.mark.parametrize("kind", ["char", "trained"])
def test_what_was_trained_is_used_again_and_not_for_other_settings(tmp_path, data, kind, monkeypatch):
    first = build_tokenizer(settings(kind, vocab_size=280), data, tmp_path / "t")
    monkeypatch.setattr(TokenizerCorpus, "texts", None)
    again = build_tokenizer(settings(kind, vocab_size=280), data, tmp_path / "t")
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(again)
    with pytest.raises(
        DataError, match=r"t holds a tokenizer made .* vocab_size: 280 in the folder, 290 in the recipe$"
    ):
        build_tokenizer(settings(kind, vocab_size=290), data, tmp_path / "t")


WAYS_OUT = "restore what it was made of, choose another train.output_dir, or remove that folder if no checkpoint"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_fraction": 0.5}, "documents.held_out: 0.0 in the folder, 0.5 in the recipe"),
        ({"seed": 5}, "documents.seed: 1234 in the folder, 5 in the recipe"),
        ({"shuffle": True}, "documents.shuffle: False in the folder, True in the recipe"),
        ({"text_key": "body"}, "documents.text.0.0: 'text' in the folder, 'body' in the recipe"),
        ({"weight": 2.0}, "documents.weights.0: 1.0 in the folder, 2.0 in the recipe"),
        ({"path": "b.jsonl"}, "documents.sources.0.a.jsonl: '.*' in the folder, nothing in the recipe"),
    ],
)
def test_a_tokenizer_of_other_documents_is_not_used(tmp_path, data, changes, message):
    build_tokenizer(settings("char"), data, tmp_path / "t")
    write_jsonl(tmp_path / "b.jsonl", make_texts(3))
    if "path" in changes:
        changes = {"path": str(tmp_path / changes["path"])}
    of_source = {"path", "weight", "text_key"} & {*changes}
    other = replace(data, sources=[replace(data.sources[0], **changes)]) if of_source else replace(data, **changes)
    with pytest.raises(DataError, match=f"{WAYS_OUT} depends on it.*{message}"):
        build_tokenizer(settings("char"), other, tmp_path / "t")


def test_a_tokenizer_of_a_file_that_changed_since_is_not_used(tmp_path, data):
    build_tokenizer(settings("char"), data, tmp_path / "t")
    write_jsonl(tmp_path / "a.jsonl", make_texts(60))
    with pytest.raises(DataError, match=r"documents.sources.0.a.jsonl: '\w+' in the folder, '\w+' in the recipe"):
        build_tokenizer(settings("char"), data, tmp_path / "t")


def test_what_a_resumed_run_may_change_leaves_the_tokenizer(tmp_path, data, monkeypatch):
    first = build_tokenizer(settings("char"), data, tmp_path / "t")
    monkeypatch.setattr(TokenizerCorpus, "texts", None)
    resumed = replace(data, workers=3, bad_rows="skip", max_line_bytes=10_000, streams=8, seq_length=64, eval_samples=9)
    again = build_tokenizer(settings("char"), resumed, tmp_path / "t")
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(again)


def test_training_reads_a_bounded_amount_of_each_source_by_weight(data, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_corpus, "TRAINING_CHARACTERS", 400)
    other = write_jsonl(tmp_path / "b.jsonl", ["b" * 10] * 1000)
    both = replace(data, sources=[data.sources[0], replace(data.sources[0], path=str(other), weight=3.0)])
    texts = list(TokenizerCorpus(both).texts())
    assert sum(len(text) for text in texts if set(text) == {"b"}) == 300
    assert 100 <= sum(len(text) for text in texts if set(text) != {"b"}) < 300
    # A small source is read once, not repeated to fill the bound.
    monkeypatch.undo()
    assert len(list(TokenizerCorpus(data).texts())) == 51


def plain_fast(vocabulary, **special):
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")), **special)


def test_a_pretrained_tokenizer_by_folder_or_file_finds_its_end_of_document_token(tmp_path):
    plain_fast({"a": 0, "<|endoftext|>": 1}).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = build_tokenizer(settings("pretrained", path=str(path)), settings_for("x"), tmp_path)
        assert tokenizer.eos_token_id == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "kind=pretrained needs tokenizer.path"),
        ("{}/none", "tokenizer.path=.*/none: no tokenizer can be loaded from it"),
        ("{}/none.json", "tokenizer.path=.*/none.json: no tokenizer can be loaded from it"),
        ("{}/broken.json", "tokenizer.path=.*/broken.json: no tokenizer can be loaded from it"),
        ("{}/no_end", "no_end has no eos_token and no <|endoftext|>; documents need a token between them"),
    ],
)
def test_pretrained_tokenizers_that_cannot_be_used(tmp_path, path, message):
    (tmp_path / "broken.json").write_text(json.dumps({"model": 3}))
    plain_fast({"a": 0}).save_pretrained(tmp_path / "no_end")
    path = path and path.format(tmp_path)
    with pytest.raises(DataError, match=message.replace("|", r"\|")):
        build_tokenizer(settings("pretrained", path=path), settings_for("x"), tmp_path)


def test_a_slow_tokenizer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenization.AutoTokenizer, "from_pretrained", lambda path, revision: object())
    with pytest.raises(DataError, match=r"tokenizer.path=slow is a object, not a fast tokenizer"):
        build_tokenizer(settings("pretrained", path="slow"), settings_for("x"), tmp_path)


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("trained", None, "tokenizer.kind=trained needs tokenizer.vocab_size: the number of tokens to learn"),
        ("trained", 256, "tokenizer.vocab_size=256 must be at least 257 for kind=trained"),
        ("char", 257, "tokenizer.vocab_size=257 must be at least 258 for kind=char"),
        ("bytes", None, r"kind='bytes' is unknown; choose one of \['byte', 'char', 'pretrained', 'trained'\]"),
    ],
)
def test_impossible_settings(tmp_path, kind, size, message):
    with pytest.raises(DataError, match=message):
        build_tokenizer(settings(kind, vocab_size=size), settings_for("x"), tmp_path)


def document(text):
    return Document(Cursor(), text, lambda: "here:1")


def test_truncation_and_padding_of_another_user_do_not_reach_the_stream(tokenizer):
    tokenizer(["long text", "x"], truncation=True, max_length=3, padding=False)
    try:
        tokens, lengths = DocumentEncoder(tokenizer, None).encode([document("long text"), document("x")])
        assert lengths == [10, 2]
        assert tokens.tolist() == [*b"long text", 256, *b"x", 256]
    finally:
        tokenizer.backend_tokenizer.no_truncation()


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(DataError, match="has no end-of-document token"):
        DocumentEncoder(plain_fast({"a": 0}), None)


def test_special_tokens_that_are_to_be_split_are_no_ends(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    split = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    text = f"a{tokenizer.eos_token}b"
    for one in (tokenizer, split):
        tokens, _ = DocumentEncoder(one, None).encode([document(text)])
        assert tokens.tolist() == [*one(text, add_special_tokens=False)["input_ids"], END]
    assert tokens.tolist() == [*text.encode(), END]
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(split)


def test_a_vocabulary_with_gaps_needs_rows_for_its_largest_id():
    gaps = plain_fast({"a": 0, "end": 9}, eos_token="end")
    assert DocumentEncoder(gaps, None).vocab_size == 10
    with pytest.raises(DataError, match=r"vocab_size=5; set model.vocab_size to at least 10"):
        DocumentEncoder(gaps, 5)


def test_negative_ids_are_refused(tokenizer):
    encoder = DocumentEncoder(tokenizer, None)
    with pytest.raises(DataError, match=r"here:1: token 1 of the document has id -3 \(None\), outside \[0, v"):
        encoder.check(np.array([5, -3], np.int32), document("x"))


def test_long_texts_are_cut_into_pieces_that_join_to_the_whole(tokenizer, monkeypatch):
    text = "word " * 250_000 + "\n" + "x" * (PIECE_CHARACTERS + 5) + "\nend"
    pieces = list(text_pieces(text))
    assert "".join(pieces) == text
    assert len(pieces) == 4
    assert max(map(len, pieces)) <= PIECE_CHARACTERS
    tokens, lengths = DocumentEncoder(tokenizer, None).encode([document(text), document("y")])
    assert lengths == [len(text) + 1, 2]
    assert bytes(tokens[: len(text)].tolist()) == text.encode()
