"""YAML text to plain values with their places, and back.

Plain scalars follow the core schema of YAML 1.2, since 1.1 makes a string of `1e-4` and a boolean of `no`.
"""

import re
from collections.abc import Callable
from typing import Any

import yaml

from neox_hf.config.document import Path, dotted
from neox_hf.errors import RecipeError

SCALARS = {
    "null": (r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    # No leading zero: a `010` that silently means 8 or 10 had better be quoted.
    "int": (r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    "float": (
        r"^(?:[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9_]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
}

TAGS = {f"tag:yaml.org,2002:{name}" for name in (*SCALARS, "str", "map", "seq")}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars above in place of its own."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own layout)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either version of YAML would read as something else than a string."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, (_pattern, _first) in SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), _first)


def dump_yaml(values: Any) -> str:
    """Plain values as YAML text, in the order given."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def read_yaml(text: str, place: Callable[[int], str]) -> tuple[Any, dict[Path, str]]:
    """Values of one YAML document and the place of each path in it; `place` names a line, counted from 1.

    Raises:
        RecipeError: the text is no YAML, or holds a key twice, a key that is no name, a custom tag or a loop.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        reader = _TreeReader(loader, place)
        return (None if node is None else reader.read(node, ())), reader.origins
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(f"{place(mark.line + 1 if mark else 1)}: not valid YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{place(line)}: not valid YAML: {error.reason} (#x{error.character:04x})") from None


class _TreeReader:
    """Walks the nodes of one document and notes the line of each value."""

    def __init__(self, loader: _Loader, place: Callable[[int], str]) -> None:
        self.loader = loader
        self.line_place = place
        self.origins: dict[Path, str] = {}
        self.open_nodes: list[yaml.Node] = []

    def place(self, node: yaml.Node) -> str:
        return self.line_place(node.start_mark.line + 1)

    def read(self, node: yaml.Node, path: Path) -> Any:
        if node.tag not in TAGS:
            raise RecipeError(f"{self.place(node)}: {dotted(path)}: the tag {node.tag} is not allowed")
        if isinstance(node, yaml.ScalarNode):
            try:
                return self.loader.construct_object(node)
            except (ValueError, KeyError):  # of a tag that promises what the text is not, as in `!!int x`
                raise RecipeError(f"{self.place(node)}: {dotted(path)} = {node.value}: is no {node.tag}") from None
        if any(node is parent for parent in self.open_nodes):
            raise RecipeError(f"{self.place(node)}: {dotted(path)}: the alias refers to the value it stands in")
        self.open_nodes.append(node)
        result = self.mapping(node, path) if isinstance(node, yaml.MappingNode) else self.sequence(node, path)
        self.open_nodes.pop()
        return result

    def sequence(self, node: yaml.SequenceNode, path: Path) -> list[Any]:
        items = []
        for position, item in enumerate(node.value):
            self.origins[(*path, position)] = self.place(item)
            items.append(self.read(item, (*path, position)))
        return items

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = self.read(key_node, path) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                where = dotted(path) or "the top level"
                raise RecipeError(f"{self.place(key_node)}: {where}: a key must be a name, found {key!r}")
            if key in lines:
                place = f"{self.place(key_node)}: {dotted((*path, key))}"
                raise RecipeError(f"{place} is given twice, first in line {lines[key]}; keep one")
            lines[key] = key_node.start_mark.line + 1
            self.origins[(*path, key)] = self.place(key_node)
            result[key] = self.read(value_node, (*path, key))
        return result
