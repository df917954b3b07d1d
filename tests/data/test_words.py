"""Words are cut where `tokenizers` cuts them, for every character that both take for the same."""

import unicodedata
from random import Random

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from neox_hf.data.word_encoding import Likeness, UnlikeCharacterError
from neox_hf.data.words import word_pattern
from tests.data.hard_texts import SURROGATES, hard_texts

BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
CONTEXTS = "a{0}b {0}{0}1{0}2  {0}  {0}'s{0}'t{0}'ll\n{0}\n\n \n {0}.\t{0}é{0}" + "\u0301 "


def library_words(text: str) -> list[str]:
    return [text[begin:end] for _, (begin, end) in BYTE_LEVEL.pre_tokenize_str(text)]


def likeness(composes: bool = False) -> Likeness:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = BYTE_LEVEL
    return Likeness(tokenizer, composes=composes)


def split_by_likeness(characters: list[str]) -> tuple[list[str], list[str]]:
    """The characters that are alike, and the others."""
    checked, alike, others = likeness(), [], []
    for character in characters:
        try:
            checked.check(character)
            alike.append(character)
        except UnlikeCharacterError:
            others.append(character)
    return alike, others


def check_all(codes: range) -> None:
    alike, others = split_by_likeness([chr(code) for code in codes if code not in SURROGATES])
    for character in alike:
        text = CONTEXTS.format(character)
        assert library_words(text) == word_pattern().findall(text), repr(character)
    # In the first plane only what one of the two Unicode versions does not know differs; above it, letters and numbers.
    assert {unicodedata.category(character) for character in others if character < "\U00010000"} <= {"Cn"}
    assert {unicodedata.category(character)[0] for character in others} <= {"C", "L", "N"}


def test_characters():
    check_all(range(0x3100))
    check_all(range(0x3100, 0x110000, 101))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_character_there_is():
    check_all(range(0x110000))


def test_words_are_the_text():
    for text in hard_texts(seed=4, number=300):
        assert "".join(word_pattern().findall(text)) == text


@pytest.mark.parametrize("character", ["\U0001d400", "𠀀", "𐐀", "\U0001d7d9"])
def test_letters_and_numbers_of_upper_planes_are_not_alike(character):
    with pytest.raises(UnlikeCharacterError, match=character):
        likeness().check(f"a{character}")
    likeness().check("a🙂")


def test_a_character_that_python_does_not_know_may_be_a_combining_mark():
    unknown = "\u0378"
    likeness(composes=False).check(unknown)
    with pytest.raises(UnlikeCharacterError, match=unknown):
        likeness(composes=True).check(unknown)


def test_what_python_calls_composed_is_composed_for_the_library():
    characters = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
    decompositions = [unicodedata.decomposition(character).split() for character in characters]
    pairs = [parts for parts in decompositions if len(parts) == 2 and not parts[0].startswith("<")]
    heads = [*(chr(int(first, 16)) for first, _ in pairs), *"xᄀ가각"]
    marks = [character for character in characters if unicodedata.combining(character)]
    tails = [*(chr(int(second, 16)) for _, second in pairs), *marks, *"ᅡᅢᆨᆩ"]
    random = Random(5)
    texts = ["".join([random.choice(heads), *random.choices(tails, k=random.randint(1, 3))]) for _ in range(50_000)]
    composed = [text for text in texts if unicodedata.is_normalized("NFC", text)]
    assert 10_000 < len(composed) < 40_000
    characters = [character for character in characters if unicodedata.is_normalized("NFC", character)]
    compose = normalizers.NFC().normalize_str
    assert [text for text in [*characters, *composed] if compose(text) != text] == []
