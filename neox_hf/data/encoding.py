"""Documents to token ids: in batches, each followed by the end-of-document token, ids checked on the host."""

from collections.abc import Iterator, Sequence
from hashlib import sha256

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from neox_hf.data.documents import Document
from neox_hf.data.word_encoding import word_encoder
from neox_hf.errors import DataError

# Longer texts are tokenized in pieces, cut after a line or a word: a tokenizer needs some 100 bytes a token while it
# works. Ids are the tokenizer's own of each piece: a token that lies across a cut is none.
PIECE_CHARACTERS = 1 << 20


class DocumentEncoder:
    """A private copy of a fast tokenizer: no truncation or padding left on, no special tokens added."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int | None) -> None:
        """`vocab_size`: ids at or over it are refused; None takes the tokenizer's own size."""
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-document token; set its eos_token")
        self._tokenizer = plain_copy(tokenizer)
        self._words = word_encoder(self._tokenizer)
        self.vocab_size = ids_of(tokenizer) if vocab_size is None else vocab_size
        self.end_of_document = int(tokenizer.eos_token_id)
        if self.end_of_document >= self.vocab_size:
            raise DataError(
                f"the tokenizer's end-of-document token {tokenizer.eos_token!r} has id {self.end_of_document}, at or "
                f"over vocab_size={self.vocab_size}; set model.vocab_size to at least {ids_of(tokenizer)}"
            )

    def encode(self, documents: Sequence[Document]) -> tuple[np.ndarray, list[int]]:
        """Tokens int32 of all documents, and how many each has; its end-of-document token is its last.

        Raises DataError for an id that the model has no row for, with the document's place.
        """
        short = iter(self._ids([document.text for document in documents if len(document.text) <= PIECE_CHARACTERS]))
        arrays, lengths = [], []
        end = np.array([self.end_of_document], np.int32)
        for document in documents:
            is_short = len(document.text) <= PIECE_CHARACTERS
            ids = next(short) if is_short else np.concatenate([*self._ids_of_pieces(document.text)])
            self.check(ids, document)
            arrays += [ids, end]
            lengths.append(len(ids) + 1)
        return np.concatenate(arrays), lengths

    def _ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Of each text: word by word, or from the tokenizer, in one call, where that cannot be."""
        by_words = [None if self._words is None else self._words.encode(text) for text in texts]
        others = [text for text, ids in zip(texts, by_words, strict=True) if ids is None]
        encodings = iter(self._tokenizer.encode_batch_fast(others, add_special_tokens=False))
        return [np.array(next(encodings).ids, np.int32) if ids is None else ids for ids in by_words]

    def _ids_of_pieces(self, text: str) -> Iterator[np.ndarray]:
        return (self._ids([piece])[0] for piece in text_pieces(text))

    def check(self, ids: np.ndarray, document: Document) -> None:
        """Raises DataError for an id outside [0, vocab_size), which an embedding would meet far from here."""
        if not ids.size or (int(ids.min()) >= 0 and int(ids.max()) < self.vocab_size):
            return
        place = int(np.flatnonzero((ids >= self.vocab_size) | (ids < 0))[0])
        wrong = int(ids[place])
        token = self._tokenizer.id_to_token(wrong) if wrong >= 0 else None
        raise DataError(
            f"{document.where()}: token {place} of the document has id {wrong} ({token!r}), outside [0, "
            f"vocab_size={self.vocab_size}); tokenizer and model do not fit, or model.vocab_size is too small"
        )


def text_pieces(text: str) -> Iterator[str]:
    """Pieces of up to PIECE_CHARACTERS, cut after the last line end, else before the last blank, else anywhere."""
    begin = 0
    while len(text) - begin > PIECE_CHARACTERS:
        limit = begin + PIECE_CHARACTERS
        end = text.rfind("\n", begin, limit) + 1 or text.rfind(" ", begin + 1, limit)
        end = end if end > begin else limit
        yield text[begin:end]
        begin = end
    yield text[begin:]


def plain_copy(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The `tokenizers` object of a fast tokenizer, copied, without truncation and padding."""
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens  # which the text leaves out
    copy.no_truncation()
    copy.no_padding()
    return copy


def ids_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows that an embedding needs: some vocabularies have gaps, so that they are more than tokens."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Of everything that decides which ids a text gets, and of the end-of-document token."""
    copy = plain_copy(tokenizer)
    split = " split" if copy.encode_special_tokens else ""
    return sha256(f"{tokenizer.eos_token_id}{split} {copy.to_str()}".encode()).hexdigest()
