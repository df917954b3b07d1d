"""`section.key=value` from the command line."""

import re

from neox_hf.config.document import Document, Path
from neox_hf.config.yaml_text import read_yaml
from neox_hf.errors import RecipeError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")


def is_override(argument: str) -> bool:
    """Whether a command-line argument is an override rather than the name of a file."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and NAME.fullmatch(key) is not None


def read_override(argument: str) -> Document:
    """A document with the one value that `argument` sets. The value is YAML: numbers, true, null, [1, 2], {a: b}.

    Raises:
        RecipeError: there is no `=`, the key is not dotted names, or the value is not valid YAML.
    """
    source = f"override '{argument}'"
    key, equals, text = argument.partition("=")
    if not equals:
        raise RecipeError(f"{source}: an override is written section.key=value")
    if NAME.fullmatch(key) is None:
        raise RecipeError(f"{source}: {key!r} is not a key; an override is written section.key=value")
    values, origins_within = read_yaml(text, lambda _: source)
    path: Path = tuple(key.split("."))
    origins = {path[:length]: source for length in range(1, len(path) + 1)}
    origins |= {path + within: source for within in origins_within}
    for name in reversed(path):
        values = {name: values}
    return Document(values, origins)
