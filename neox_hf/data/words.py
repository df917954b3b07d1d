r"""The words of a text, as byte-level tokenizers cut it with GPT-2's regular expression.

    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

`re` cuts fastest, but knows no \p{L} and takes \s otherwise, so the classes are spelt out here.
"""

import re
from collections.abc import Callable
from functools import cache
from unicodedata import category

FIRST_PLANE = 0x10000
# `str.isspace` counts these in, Unicode's White_Space does not.
NO_WHITE_SPACE = "\x1c\x1d\x1e\x1f"


@cache
def word_pattern() -> re.Pattern[str]:
    """Its matches, one after the other, are the words of a text; joined they are the text.

    Characters above the first plane count as neither letters nor numbers: `re` has a table for that plane, but would
    try the ranges of the others one by one. Letters come first, as the most frequent: no alternative moved behind them
    could match where they do.
    """
    letter = _class(lambda character: category(character).startswith("L"))
    number = _class(lambda character: category(character).startswith("N"))
    space = _class(lambda character: character.isspace() and character not in NO_WHITE_SPACE)
    return re.compile(
        f" ?[{letter}]+| ?[{number}]+|'(?:[stmd]|re|ve|ll)| ?[^{space}{letter}{number}]+"
        f"|[{space}]+(?![^{space}])|[{space}]+"
    )


def _class(belongs: Callable[[str], bool]) -> str:
    """The inside of a character class: the ranges of characters of the first plane that belong to it."""
    members = [False, *(belongs(chr(code)) for code in range(FIRST_PLANE)), False]
    edges = [code for code in range(FIRST_PLANE + 1) if members[code] != members[code + 1]]
    return "".join(f"\\u{begin:04x}-\\u{end - 1:04x}" for begin, end in zip(edges[::2], edges[1::2], strict=True))
