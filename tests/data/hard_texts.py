"""Texts on which two ways of tokenizing are likely to differ, and tokenizers for them."""

import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from neox_hf.data.tokenization import train_bpe

SURROGATES = range(0xD800, 0xE000)
SPACES = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u180e\u2000\u2003\u200a\u200b\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
)
POOLS = {
    "letters": "etaoinshrdluETAOIN",
    "digits": "0123456789",
    "other numbers": "²½٣৪Ⅷⅻ〇㊀𝟙",
    "signs": "!\"#$%&()*+,-./:;<=>?@[]^_`{|}~'\u2019“”—…€\x00\x7f\x80",
    "blanks": " ",
    "spaces": SPACES,
    "alphabets": "äéßœñøİıłжщяΩσςאبक日本語한글ひらがな",
    "marks": "\u0301\u0308\u0327\u0338\u0345\u093c\u0f71\u1dfa\u3099",
    "jamo and singletons": "ᄀ각각ÅΩ豈क़",
    "emoji": "🙂👩\u200d💻🏽🇩🇪✈\ufe0f",
    "upper planes": "𐐀𝔄𠀀🀀\U000e0041\U0010fffd",
}
SNIPPETS = [
    *(
        "'s",
        "'t",
        "'re",
        "'ve",
        "'m",
        "'ll",
        "'d",
        "'S",
        " 's",
        "\u2019s",
        "''re",
        "def f(x):\n    return x\n",
        "http://a.b/c?d=1",
    ),
    *("<|endoftext|>", "<|padding|>", "<|endof", "text|>", "<|<|endoftext|>", "\r\n", "\n\n", "\t\t"),
]


def hard_texts(seed: int, number: int, length: int = 60) -> Iterator[str]:
    """Each mixes a few kinds of characters, runs of blanks, snippets, and sometimes any character at all."""
    random = Random(seed)
    for _ in range(number):
        kinds = random.sample(sorted(POOLS), k=random.randint(1, 4))
        yield "".join(_piece(random, kinds) for _ in range(random.randint(1, length)))


def _piece(random: Random, kinds: list[str]) -> str:
    chance = random.random()
    if chance < 0.05:
        return " " * random.randint(1, 60)
    if chance < 0.1:
        return random.choice(SNIPPETS)
    if chance < 0.101:
        return any_character(random)
    return random.choice(POOLS[random.choice(kinds)])


def any_character(random: Random) -> str:
    code = random.randrange(0x110000 - len(SURROGATES))
    return chr(code if code < SURROGATES.start else code + len(SURROGATES))


def library_texts(first: int, characters: int) -> Iterator[str]:
    """Files of the standard library from the `first` on, up to about so many characters."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")) + sorted(
        Path(sysconfig.get_path("stdlib")).glob("[a-m]*/*.py")
    )
    for file in files[first:]:
        text = file.read_text("utf-8", errors="replace")
        yield text
        characters -= len(text)
        if characters <= 0:
            return


@cache
def small_bpe() -> PreTrainedTokenizerFast:
    return train_bpe(library_texts(0, 400_000), 2000)


def neox_20b_like() -> PreTrainedTokenizerFast:
    """NFC and added tokens as in GPT-NeoX-20B: two special ones, and runs of 2 to 24 blanks past the vocabulary."""
    tokenizer = Tokenizer.from_str(small_bpe().backend_tokenizer.to_str())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens([AddedToken("<|padding|>", normalized=False)])
    tokenizer.add_tokens([AddedToken(" " * count, normalized=True) for count in range(24, 1, -1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
