"""Fields of training arguments whose values a command line gives as text, and Python and recipes as what they are.

Such a field is `Annotated[what HF's parser of command lines is to see, what its values are]`.
"""

import typing
from typing import Annotated, Any

import yaml

from neox_hf.config.annotations import describe, fits


def value_types(arguments: type) -> dict[str, Any]:
    """The type of each field's values, by name."""
    hints = typing.get_type_hints(arguments, include_extras=True)
    return {name: hint.__metadata__[0] if _is_annotated(hint) else hint for name, hint in hints.items()}


def settle_values(arguments: Any, names: typing.Iterable[str]) -> None:
    """Have the fields called `names` hold what text among them stands for, as it would in a recipe.

    Raises:
        ValueError: a value is none that its field takes.
    """
    hints, wanted = typing.get_type_hints(type(arguments), include_extras=True), value_types(type(arguments))
    for name in names:
        value = getattr(arguments, name)
        if _is_annotated(hints[name]) and isinstance(value, str):
            value = yaml.safe_load(value)
            setattr(arguments, name, value)
        if not fits(wanted[name], value):
            raise ValueError(f"{name}={value!r}: wants {describe(wanted[name])}")


def _is_annotated(hint: Any) -> bool:
    return typing.get_origin(hint) is Annotated
