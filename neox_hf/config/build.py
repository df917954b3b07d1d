"""A document becomes an instance of a dataclass, or an error that lists everything wrong with it."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args, get_origin

from neox_hf.config.annotations import choices, describe, fits, is_union
from neox_hf.config.document import Document, Path, dotted
from neox_hf.config.problems import Problem, nearest, report
from neox_hf.errors import RecipeError

T = TypeVar("T")


def build(schema: type[T], document: Document, refused: Mapping[str, str] | None = None) -> T:
    """Make a `schema`, a dataclass of values, lists and further dataclasses, from the document's values.

    refused: dotted keys that somebody may well write here, each with the reason why they cannot.

    Raises:
        RecipeError: unknown, refused or missing keys and values of another type, all of them together.
    """
    builder = _Builder(schema, refused or {})
    instance = builder.instance_of(schema, document.values, ())
    report(builder.problems, document)
    return instance


def schema_keys(schema: type, path: Path = ()) -> Iterator[Path]:
    """Every key of a schema and of the dataclasses within it; lists of dataclasses are not entered."""
    for name, annotation in typing.get_type_hints(schema).items():
        yield (*path, name)
        if dataclasses.is_dataclass(annotation):
            yield from schema_keys(annotation, (*path, name))


class _Builder:
    """Converts from the root down and collects problems; with the first one the result no longer matters."""

    def __init__(self, root: type, refused: Mapping[str, str]) -> None:
        self.known = list(schema_keys(root))
        self.refused = refused
        self.problems: list[Problem] = []

    def instance_of(self, schema: type, values: Any, path: Path) -> Any:
        if not isinstance(values, dict):
            return self.problem(path, values, "wants a mapping of keys to values")
        before = len(self.problems)
        annotations = typing.get_type_hints(schema)
        fields = {field.name: field for field in dataclasses.fields(schema) if field.init}
        given = {}
        for key, value in values.items():
            if key in fields:
                given[key] = self.value_of(annotations[key], value, (*path, key))
            else:
                self.unknown(path, key, value, list(fields))
        for name, field in fields.items():
            has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
            if name not in values and not has_default:
                self.problem(path, values, f"the key {name} is missing")
        if len(self.problems) > before:
            return None
        try:
            return schema(**given)
        except RecipeError as error:  # the schema's own __post_init__ found values that do not go together
            return self.problem(path, values, str(error))

    def value_of(self, annotation: Any, value: Any, path: Path) -> Any:
        if is_union(annotation) and value is not None:
            nested = [member for member in get_args(annotation) if dataclasses.is_dataclass(member)]
            annotation = nested[0] if nested else annotation
        if dataclasses.is_dataclass(annotation):
            return self.instance_of(annotation, value, path)
        if get_origin(annotation) is list and dataclasses.is_dataclass(get_args(annotation)[0]):
            return self.list_of(get_args(annotation)[0], value, path)
        if not fits(annotation, value):
            self.problem(path, value, f"wants {describe(annotation)}{self.hint(annotation, value)}")
        return value

    def list_of(self, item: type, values: Any, path: Path) -> Any:
        if not isinstance(values, list):
            return self.problem(path, values, "wants a list")
        return [self.instance_of(item, value, (*path, position)) for position, value in enumerate(values)]

    def problem(self, path: Path, value: Any, message: str) -> None:
        self.problems.append(Problem(path, value, message))

    def unknown(self, path: Path, key: str, value: Any, names: list[str]) -> None:
        where = (*path, key)
        if dotted(where) in self.refused:
            return self.problem(where, value, self.refused[dotted(where)])
        meant = self.meant(path, key, names)
        return self.problem(where, value, "unknown key" + (f"; did you mean {meant}?" if meant else ""))

    def meant(self, path: Path, key: str, names: list[str]) -> str | None:
        """The right name: a near one here, or else the same or a near one in another section."""
        here = nearest(key, names)
        if here:
            return dotted((*path, here))
        elsewhere = {str(known[-1]): known for known in reversed(self.known)}
        there = nearest(key, elsewhere)
        return dotted(elsewhere[there]) if there else None

    @staticmethod
    def hint(annotation: Any, value: Any) -> str:
        if isinstance(value, str):
            close = nearest(value, [choice for choice in choices(annotation) if isinstance(choice, str)])
            return f"; did you mean {close}?" if close else ""
        if isinstance(value, int | float) and fits(annotation, str(value)):
            return "; put it in quotes"
        return ""
