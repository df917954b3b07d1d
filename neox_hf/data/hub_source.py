"""Datasets of the Hub (or any folder the `datasets` library reads), streamed. The one file that imports `datasets`."""

from collections.abc import Iterator
from pathlib import Path

import datasets

from neox_hf.data.bad_rows import text_of_record
from neox_hf.data.files import fingerprint_of
from neox_hf.data.lines import Row
from neox_hf.data.settings import SourceSettings
from neox_hf.errors import DataError


class HubSource:
    """`hub:owner/name`: a part is one of the dataset's shards, a row one of its rows.

    Resuming inside a shard skips its rows without tokenizing them. Faults that the dataset's own reader meets (broken
    files, the network) end the run with a DataError: `data.bad_rows` speaks of rows that could be read.
    """

    def __init__(self, settings: SourceSettings) -> None:
        self.path = settings.path
        self._settings = settings
        self._name = settings.path.removeprefix("hub:")
        try:
            builder = datasets.load_dataset_builder(self._name, name=settings.name, revision=settings.revision)
            self._rows = builder.as_streaming_dataset(split=settings.split)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"data.sources: cannot open {self.path} (name={settings.name}, split={settings.split}, "
                f"revision={settings.revision}): {error}"
            ) from error
        self._data_files = (builder.config.data_files or {}).get(settings.split) or []
        self.parts = self.sequential_parts = self._rows.num_shards

    def rows(self, part: int, position: int | None) -> Iterator[Row]:
        first = position or 0
        shard = self._rows.shard(num_shards=self.parts, index=part, contiguous=True)
        number = first
        try:
            for number, record in enumerate(shard.skip(first) if first else shard, start=first):
                yield Row(number, record)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{self.where(part, number)} or later: the dataset cannot be read: {error}") from error

    def text(self, part: int, row: Row) -> str:
        return text_of_record(row.value, self._settings.text_key)

    def key(self, part: int, position: int) -> tuple[int, int]:
        return part, position

    def where(self, part: int, position: int) -> str:
        return f"{self.path} shard {part}:{position + 1}"

    def mark(self, part: int, position: int) -> str:
        return self.where(part, position)

    def fingerprint(self) -> dict[str, str]:
        """Names of the data files; those on the Hub carry the commit they belong to, local ones what is in them."""
        settings = self._settings
        files = [_described(str(name)) for name in self._data_files]
        described = f"name={settings.name} split={settings.split} shards={self.parts}"
        return {self._name if not Path(self._name).exists() else Path(self._name).name: " ".join([described, *files])}


def _described(name: str) -> str:
    if "://" in name:
        return name
    path = Path(name)
    return f"{path.name}:{fingerprint_of(path)}" if path.is_file() else path.name
