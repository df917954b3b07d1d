"""Encoding word by word gives the tokenizer's own ids, or leaves the text to it."""

from random import Random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from neox_hf.data import word_encoding
from neox_hf.data.assignment import Cursor
from neox_hf.data.documents import Document
from neox_hf.data.encoding import DocumentEncoder
from neox_hf.data.tokenization import byte_tokenizer
from neox_hf.data.word_encoding import WordIds, word_encoder
from tests.data.hard_texts import POOLS, hard_texts, library_texts, neox_20b_like, small_bpe

TOKENIZERS = {"byte": byte_tokenizer, "bpe": small_bpe, "20b": neox_20b_like}


@pytest.fixture(scope="module", params=TOKENIZERS)
def fast(request):
    return TOKENIZERS[request.param]()


def left_over(fast, texts) -> int:
    """How many of the texts are left to the tokenizer. The others must have its ids."""
    texts = list(texts)
    encoder = word_encoder(fast.backend_tokenizer)
    wanted = fast(texts, add_special_tokens=False)["input_ids"]
    found = [encoder.encode(text) for text in texts]
    for text, ids, right in zip(texts, found, wanted, strict=True):
        assert ids is None or ids.tolist() == right, repr(text)
    return sum(ids is None for ids in found)


def test_hard_texts(fast):
    assert left_over(fast, hard_texts(seed=1, number=3000)) < 1800


def test_ordinary_text_is_not_left_over(fast):
    texts = [text for text in library_texts(5, 1_200_000) if text.isascii()]
    assert sum(map(len, texts)) > 1e6
    assert left_over(fast, texts) == 0
    others = [
        "Naïve «тест» \u2013 \u2018quoted\u2019 日本語 한국어 🙂\u00a0½ x² ",
        POOLS["alphabets"],
        POOLS["emoji"],
        "",
    ]
    assert left_over(fast, others) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_more_texts(fast):
    assert left_over(fast, library_texts(0, 6_000_000)) < 20
    for seed in range(2, 5):
        left_over(fast, hard_texts(seed, number=10_000, length=100))


def test_added_tokens_in_all_places():
    random = Random(3)
    parts = [
        "<|endoftext|>",
        "<|padding|>",
        "<|end",
        "|>",
        "  ",
        " ",
        "a",
        "'s",
        "\n",
        *(" " * n for n in range(20, 55)),
    ]
    texts = ["".join(random.choices(parts, k=random.randint(1, 12))) for _ in range(3000)]
    assert left_over(neox_20b_like(), texts) == 0


def test_added_tokens_before_and_after_normalization_overlap():
    backend = neox_20b_like().backend_tokenizer
    backend.add_tokens([AddedToken("ab", normalized=False), AddedToken("abc", normalized=True)])
    backend.add_tokens([AddedToken("é", normalized=False), AddedToken("bc  ", normalized=False)])
    encoder = word_encoder(backend)
    random = Random(6)
    for _ in range(2000):
        text = "".join(random.choices(["a", "b", "c", "é", " ", "e\u0301", "abc"], k=random.randint(1, 12)))
        ids = encoder.encode(text)
        assert ("\u0301" in text) == (ids is None)
        assert ids is None or ids.tolist() == backend.encode(text, add_special_tokens=False).ids, repr(text)


def test_forgetting_words_changes_no_id(monkeypatch):
    monkeypatch.setattr(word_encoding, "GENERATION_WORDS", 50)
    backend = neox_20b_like().backend_tokenizer
    ids = WordIds(backend, composes=True)
    words = [f" w{Random(n).randrange(400)}" for n in range(3000)] + ["    ", "<|endoftext|>"] * 3
    for word in words:
        assert ids[word] == int32_bytes(backend.encode(word, add_special_tokens=False).ids)
        assert len(ids) <= 50
    assert left_over(neox_20b_like(), library_texts(9, 30_000)) == 0


def int32_bytes(ids: list[int]) -> bytes:
    return b"".join(id_.to_bytes(4, "little") for id_ in ids)


def test_long_words_are_not_kept():
    ids = WordIds(byte_tokenizer().backend_tokenizer, composes=False)
    for length in (64, 65, 100_000):
        assert ids["x" * length] == int32_bytes([ord("x")] * length)
    assert [*ids] == ["x" * 64]


def changed(**parts) -> Tokenizer:
    tokenizer = Tokenizer.from_str(small_bpe().backend_tokenizer.to_str())
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def with_token(token: AddedToken) -> Tokenizer:
    tokenizer = changed(normalizer=normalizers.NFC())
    tokenizer.add_tokens([token])
    return tokenizer


def with_truncation() -> Tokenizer:
    tokenizer = changed()
    tokenizer.enable_truncation(5)
    return tokenizer


def with_padding() -> Tokenizer:
    tokenizer = changed()
    tokenizer.enable_padding(length=5)
    return tokenizer


def with_dropout() -> Tokenizer:
    tokenizer = changed()
    tokenizer.model.dropout = 0.5
    return tokenizer


def of_other_model() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


BYTES_ALONE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
OTHERS = {
    "dropout": with_dropout,
    "model": of_other_model,
    "no pre-tokenizer": lambda: Tokenizer(models.BPE()),
    "prefix": lambda: changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "no words": lambda: changed(pre_tokenizer=BYTES_ALONE),
    "digits": lambda: changed(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "another expression": lambda: changed(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"), BYTES_ALONE])
    ),
    "lower case": lambda: changed(normalizer=normalizers.Lowercase()),
    "two normalizers": lambda: changed(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
    "truncation": with_truncation,
    "padding": with_padding,
    "left strip": lambda: with_token(AddedToken("<x>", lstrip=True)),
    "right strip": lambda: with_token(AddedToken("<x>", rstrip=True)),
    "single word": lambda: with_token(AddedToken("<x>", single_word=True)),
    "normalized token": lambda: with_token(AddedToken("e\u0301", normalized=True)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_tokenizers_have_no_such_way(name):
    assert word_encoder(OTHERS[name]()) is None


def test_a_sequence_of_one_part_is_that_part():
    one = changed(
        normalizer=normalizers.Sequence([normalizers.NFC()]),
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    )
    encoder = word_encoder(one)
    for text in ("Ein Test,  it's 1.", "e\u0301"):
        ids = encoder.encode(text)
        assert (ids is None) == ("\u0301" in text)
        assert ids is None or ids.tolist() == one.encode(text, add_special_tokens=False).ids


def test_texts_left_over_keep_their_place_among_the_documents():
    fast = neox_20b_like()
    texts = ["plain text", "e\u0301 decomposed", "𠀀 letter", "more  plain", "\u0378 unassigned", "end"]
    tokens, lengths = DocumentEncoder(fast, None).encode([Document(Cursor(), text, lambda: "") for text in texts])
    wanted = [fast(text, add_special_tokens=False)["input_ids"] + [0] for text in texts]
    assert lengths == [len(ids) for ids in wanted]
    assert tokens.tolist() == [id_ for ids in wanted for id_ in ids]
    assert left_over(fast, texts) == 3
