"""Several documents become one; the later one wins."""

from collections.abc import Iterable, Mapping
from typing import Any

from neox_hf.config.document import Document, Path


def merge(documents: Iterable[Document], shorthands: Mapping[str, str] | None = None) -> Document:
    """Merge left to right. Mappings merge key by key; lists and scalars replace.

    shorthands: for a section that may be written as one string, the key which that string stands for. Written so,
        the section starts anew: what earlier documents said of it is forgotten.
    """
    merged = Document()
    for document in documents:
        for section, key in (shorthands or {}).items():
            if isinstance(document.values.get(section), str):
                merged = _without(merged, section)
                document = _spelt_out(document, section, key)
        merged = _overlay(merged, document)
    return merged


def _without(document: Document, section: str) -> Document:
    return Document(
        {key: value for key, value in document.values.items() if key != section},
        {path: origin for path, origin in document.origins.items() if path[0] != section},
    )


def _spelt_out(document: Document, section: str, key: str) -> Document:
    values = {**document.values, section: {key: document.values[section]}}
    return Document(values, {**document.origins, (section, key): document.origins[(section,)]})


def _overlay(base: Document, later: Document) -> Document:
    replaced: list[Path] = []
    values = _overlay_values(base.values, later.values, (), replaced)
    kept = {path: origin for path, origin in base.origins.items() if not any(path[: len(r)] == r for r in replaced)}
    return Document(values, kept | later.origins)


def _overlay_values(base: dict[str, Any], later: dict[str, Any], path: Path, replaced: list[Path]) -> dict[str, Any]:
    """`base` with `later` on top; adds to `replaced` the paths where nothing of `base` is left."""
    result = dict(base)
    for key, value in later.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            result[key] = _overlay_values(base[key], value, (*path, key), replaced)
        else:
            result[key] = value
            replaced.append((*path, key))
    return result
