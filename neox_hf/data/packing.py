"""Documents become samples: tokens one after the other, an end-of-document token between, cut every seq_length.

As in GPT-NeoX a sample has seq_length + 1 tokens and its last token is the first of the next, so every token is
predicted once.
"""

from collections import deque
from collections.abc import Iterator
from itertools import islice

import numpy as np

from neox_hf.data.assignment import Cursor
from neox_hf.data.documents import Document
from neox_hf.data.encoding import DocumentEncoder

# Only how much is tokenized at once depends on this, never the result.
FIRST_GUESS_CHARACTERS_PER_TOKEN = 4.0


class Packer:
    """The samples of one stream of one source, from a cursor on.

    Memory: the tokens (int32) of the documents under the current sample, and one batch of documents ahead.
    """

    def __init__(self, documents: Iterator[Document], encoder: DocumentEncoder, seq_length: int, offset: int) -> None:
        """`offset`: tokens of the first document that are already behind."""
        self._documents = documents
        self._encoder = encoder
        self._seq_length = seq_length
        self._tokens = np.empty(0, np.int32)
        self._begin = offset  # in self._tokens, of the next sample
        self._spans: deque[tuple[Cursor, int]] = deque()  # documents that self._tokens holds, and their lengths
        self._span_offset = offset  # of the next sample in the first of them
        self._characters_per_token = FIRST_GUESS_CHARACTERS_PER_TOKEN

    def next_sample(self) -> tuple[np.ndarray, Cursor]:
        """Tokens int32 [seq_length + 1], and the cursor where the sample after it begins."""
        while (missing := self._begin + self._seq_length + 1 - len(self._tokens)) > 0:
            self._tokenize(missing)
        sample = self._tokens[self._begin : self._begin + self._seq_length + 1].copy()
        self._begin += self._seq_length
        self._span_offset += self._seq_length
        while self._span_offset >= self._spans[0][1]:
            self._span_offset -= self._spans.popleft()[1]
        return sample, self._spans[0][0]._replace(offset=self._span_offset)

    def _tokenize(self, missing: int) -> None:
        """Adds about `missing` tokens, at least one document."""
        wanted, characters = missing * self._characters_per_token, 0
        batch: list[Document] = []
        while characters < wanted or not batch:
            (document,) = islice(self._documents, 1)
            batch.append(document)
            characters += len(document.text)
        tokens, lengths = self._encoder.encode(batch)
        self._characters_per_token = characters / len(tokens)
        self._spans.extend((document.cursor, length) for document, length in zip(batch, lengths, strict=True))
        # What lies before the first span's start has been dealt out; drop it, and keep positions relative to the rest.
        self._tokens = np.concatenate([self._tokens[self._begin - self._span_offset :], tokens])
        self._begin = self._span_offset
