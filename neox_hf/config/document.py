"""A tree of plain values, and for each of them the place it was written."""

from dataclasses import dataclass, field
from typing import Any

Path = tuple[str | int, ...]
"""Way from the root to a value: keys of mappings, and positions in lists counted from 0."""


@dataclass(frozen=True)
class Document:
    """What one or several files say.

    values: mappings, lists and scalars. origins: `recipe.yaml:12` or `override 'train.seed=1'` for each path.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Path, str] = field(default_factory=dict)

    def origin(self, path: Path) -> str:
        """The place that wrote `path`. What nobody wrote is a default value of the part of the tree around it."""
        if path in self.origins:
            return self.origins[path]
        around = [self.origins[path[:length]] for length in range(len(path)) if path[:length] in self.origins]
        return f"{around[-1]} (default value)" if around else "default value"


def dotted(path: Path) -> str:
    """`data.sources[0].weight`, as messages write it."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")
