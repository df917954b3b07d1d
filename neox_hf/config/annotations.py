"""A value against one type annotation: does it fit, and how a person would say what was wanted."""

import enum
import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)

WORDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    dict: "a mapping",
    list: "a list",
    Any: "any value",
}


def is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def plain(annotation: Any) -> Any:
    """The annotation with an enumeration written as the literal values a file can hold.

    `SomeEnum | str`, by which HF says "the name of a member", becomes those names alone.
    """
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return Literal[tuple(member.value for member in annotation)]
    if is_union(annotation):
        members = get_args(annotation)
        has_names = any(isinstance(member, type) and issubclass(member, enum.Enum) for member in members)
        return Union[tuple(plain(member) for member in members if not (has_names and member is str))]  # noqa: UP007
    if get_origin(annotation) is list:
        return list[plain(get_args(annotation)[0])]
    return annotation


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=STRICT)


def fits(annotation: Any, value: Any) -> bool:
    """Whether `value` is of the type, strictly: a whole number will do for a float, nothing else is converted."""
    try:
        _adapter(plain(annotation)).validate_python(value)
    except ValidationError:
        return False
    return True


def choices(annotation: Any) -> list[Any]:
    """Every literal value that the annotation names."""
    annotation = plain(annotation)
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for member in get_args(annotation) for choice in choices(member)] if is_union(annotation) else []


def describe(annotation: Any) -> str:
    """The annotation in words: `a whole number or null`."""
    annotation = plain(annotation)
    if annotation in WORDS:
        return WORDS[annotation]
    if get_origin(annotation) is Literal:
        values = [str(value).lower() if isinstance(value, bool) else str(value) for value in get_args(annotation)]
        return "one of " + ", ".join(values) if len(values) > 1 else values[0]
    if is_union(annotation):
        return " or ".join(dict.fromkeys(describe(member) for member in get_args(annotation)))
    if get_origin(annotation) is list:
        return f"a list, each item {describe(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "a mapping"
    raise TypeError(f"a schema uses {annotation!r}, which no recipe can express")
