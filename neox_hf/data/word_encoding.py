"""The ids of a byte-level BPE tokenizer, several times as fast: a text is cut into words, and words are remembered.

A BPE model never sees more than one word at a time, and most words have been seen before. The others are encoded by
the tokenizer's own model, so the ids are exactly the tokenizer's, whatever has been read before.
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from neox_hf.data.words import word_pattern

# Two generations of so many words are remembered, in some 40 MB.
GENERATION_WORDS = 1 << 17
MOST_CHARACTERS = 64  # of a word that is remembered


class UnlikeCharacterError(Exception):
    """A character that the tokenizer may treat in another way than is done here."""


class WordEncoder:
    """Encodes a text as one `tokenizers` object does. `word_encoder` tells whether there can be one."""

    def __init__(self, tokenizer: Tokenizer, *, composes: bool) -> None:
        """`composes`: the tokenizer's normalizer is NFC; else it has none."""
        self._composes = composes
        self._find_words = word_pattern().findall
        self._ids = WordIds(tokenizer, composes=composes)
        # As in `tokenizers`, those that pass by the normalizer are cut out of the text before the others.
        added = tokenizer.get_added_tokens_decoder().values()
        tiers = ([token.content for token in added if token.normalized == tier] for tier in (False, True))
        self._added = [longest_of(contents) for contents in tiers if contents]

    def encode(self, text: str) -> np.ndarray | None:
        """Ids int32 without special tokens around them; None for a text that only the tokenizer encodes."""
        if self._composes and not unicodedata.is_normalized("NFC", text):
            return None
        try:
            ids = b"".join(map(self._ids.__getitem__, self._cut(text)))
        except UnlikeCharacterError:
            return None
        return np.frombuffer(ids, np.int32)

    def _cut(self, text: str, tier: int = 0) -> list[str]:
        """Words and added tokens. No word contains an added token, so one mapping serves both."""
        if tier == len(self._added):
            return self._find_words(text)
        texts_and_tokens = self._added[tier].split(text)
        words = self._cut(texts_and_tokens[0], tier + 1)
        for token, after in zip(texts_and_tokens[1::2], texts_and_tokens[2::2], strict=True):
            words.append(token)
            if after:
                words += self._cut(after, tier + 1)
        return words


class WordIds(dict[str, bytes]):
    """The ids, as the bytes of int32, of each word and added token. Looking a word up adds it.

    When a generation is full it becomes the older one, from which the words still in use come back, and the one before
    it is forgotten.
    """

    def __init__(self, tokenizer: Tokenizer, *, composes: bool) -> None:
        super().__init__()
        self._older: dict[str, bytes] = {}
        self._added = {token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items()}
        # The same model without normalizer and added tokens, which takes a word as it is.
        self._model = Tokenizer(tokenizer.model)
        self._model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._likeness = Likeness(tokenizer, composes=composes)

    def __missing__(self, word: str) -> bytes:
        """Raises UnlikeCharacterError."""
        ids = self._older.get(word)
        if ids is None:
            ids = np.array(self._encode(word), np.int32).tobytes()
        if len(word) <= MOST_CHARACTERS:
            if len(self) >= GENERATION_WORDS:
                self._older = dict(self)
                self.clear()
            self[word] = ids
        return ids

    def _encode(self, word: str) -> Sequence[int]:
        if word in self._added:
            return [self._added[word]]
        self._likeness.check(word)
        return self._model.encode(word, add_special_tokens=False).ids


class Likeness:
    """Whether the tokenizer takes a character for what Python takes it for: their Unicode versions differ.

    Letter, number, space or none of them is found out by trying. Of NFC, Unicode's stability policy promises that
    what one version calls composed is so in older versions, and in newer ones too where the older knows every
    character; one that Python does not know may be a combining mark to the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, *, composes: bool) -> None:
        self._pre_tokenizer = tokenizer.pre_tokenizer
        self._composes = composes
        self._alike: set[str] = set()

    def check(self, word: str) -> None:
        """Raises UnlikeCharacterError for a character that is not alike."""
        for character in set(word) - self._alike:
            if not self._is_alike(character):
                raise UnlikeCharacterError(character)
            self._alike.add(character)

    def _is_alike(self, character: str) -> bool:
        if self._composes and unicodedata.category(character) == "Cn":
            return False
        # Of a letter, a number, a space or another, each sticks to other neighbours.
        trial = f"a{character}a1{character}1.{character}. {character}"
        pieces = self._pre_tokenizer.pre_tokenize_str(trial)
        return [trial[begin:end] for _, (begin, end) in pieces] == word_pattern().findall(trial)


def word_encoder(tokenizer: Tokenizer) -> WordEncoder | None:
    """The fast way of a tokenizer of GPT-2's kind (GPT-NeoX-20B, Pythia, our own); None for any other kind.

    That is: BPE without dropout over the bytes of GPT-2's words, normalizer NFC or none, and added tokens that match
    wherever their text stands.
    """
    parts = json.loads(tokenizer.to_str())
    normalizer = _only_one(parts["normalizer"], "normalizers")
    added = tokenizer.get_added_tokens_decoder().values()
    fits = (
        parts["model"]["type"] == "BPE"
        and not parts["model"]["dropout"]
        and _is_byte_level(_only_one(parts["pre_tokenizer"], "pretokenizers"))
        and normalizer in (None, {"type": "NFC"})
        and parts["truncation"] is None
        and parts["padding"] is None
        and not tokenizer.encode_special_tokens
        and all(_matches_anywhere(token) for token in added)
    )
    return WordEncoder(tokenizer, composes=normalizer is not None) if fits else None


def longest_of(contents: Sequence[str]) -> re.Pattern[str]:
    """Matches the longest of `contents` at the first place where there is one."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(contents, key=len, reverse=True)))})")


def _only_one(part: Mapping | None, parts: str) -> Mapping | None:
    """A sequence of one part is that part."""
    while part is not None and part["type"] == "Sequence" and len(part[parts]) == 1:
        (part,) = part[parts]
    return part


def _is_byte_level(part: Mapping | None) -> bool:
    return part is not None and part["type"] == "ByteLevel" and part["use_regex"] and not part["add_prefix_space"]


def _matches_anywhere(token: AddedToken) -> bool:
    """And is the same after any normalizer."""
    is_plain = not (token.single_word or token.lstrip or token.rstrip)
    return is_plain and (token.content.isascii() or not token.normalized)
