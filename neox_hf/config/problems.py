"""What is wrong with a recipe, said in one line each, all at once."""

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from neox_hf.config.document import Document, Path, dotted
from neox_hf.errors import RecipeError

LONGEST_VALUE = 120
"""Characters of a value that a message shows."""


@dataclass(frozen=True)
class Problem:
    """One mistake: where in the tree, the value found there, and what was wanted instead."""

    path: Path
    value: Any
    message: str


def shown(value: Any) -> str:
    """A value on one line, spelt as a recipe spells it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "..."


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that is spelt most like `name`, or None when nothing comes close."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return found[0] if found else None


def report(problems: Sequence[Problem], document: Document) -> None:
    """Raise all problems as one error, in the order of their keys.

    Raises:
        RecipeError: there is at least one problem.
    """
    lines = [
        f"{document.origin(problem.path)}: {dotted(problem.path)} = {shown(problem.value)}: {problem.message}"
        for problem in sorted(problems, key=lambda problem: (dotted(problem.path), problem.message))
    ]
    if len(lines) == 1:
        raise RecipeError(lines[0])
    if lines:
        raise RecipeError(f"{len(lines)} problems:\n  " + "\n  ".join(lines))
