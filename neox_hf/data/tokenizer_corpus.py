"""The texts that a tokenizer of the run's own is made from."""

from collections.abc import Iterator
from pathlib import Path

from neox_hf.data.assignment import Order, assign
from neox_hf.data.bad_rows import BadRowPolicy, without_copies
from neox_hf.data.documents import read_documents
from neox_hf.data.settings import DataSettings
from neox_hf.data.stream import choose_split, documents_fingerprint, open_sources

# Enough for a stable vocabulary, and seconds of work.
TRAINING_CHARACTERS = 32 * 1024 * 1024


class TokenizerCorpus:
    """Texts of the training split in the run's order, from each source its weight's share of TRAINING_CHARACTERS.

    They do not depend on the number of ranks, streams or workers.
    """

    def __init__(self, data: DataSettings) -> None:
        """Raises DataError when a source holds nothing."""
        self._data = data
        self._split, self._chosen = choose_split(data, "train")
        self._bad_rows = BadRowPolicy(without_copies(data.bad_rows), Path())
        self._sources = open_sources(self._chosen, data, 1, self._bad_rows)

    def fingerprint(self) -> dict[str, object]:
        """What defines the texts. As for streams, `bad_rows` and `max_line_bytes` are not part of it."""
        return documents_fingerprint(self._data, self._split, self._chosen, self._sources)

    def texts(self) -> Iterator[str]:
        total = sum(source.weight for source in self._chosen)
        for number, source in enumerate(self._sources):
            order = Order(source.parts, self._data.shuffle, self._data.seed, number)
            rows = assign(source, order, 1, {}, range(1)).rows(0)
            room = TRAINING_CHARACTERS * self._chosen[number].weight / total
            for document in read_documents(source, rows, 1, self._split, self._bad_rows):
                if room <= 0 or document.cursor.epoch > 0:
                    break
                yield document.text
                room -= len(document.text)
