"""docs/recipe.md lists every key with its type and its default, and every field that `train:` refuses."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from neox_hf.config import shown
from neox_hf.config.annotations import describe
from neox_hf.data.settings import SourceSettings
from neox_hf.training.recipe import Recipe
from neox_hf.training.train_section import REFUSED

PAGE = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text(encoding="utf-8")
SCHEMAS = {**typing.get_type_hints(Recipe), "data.sources[]": SourceSettings}

# Where the exact type would say less than these words.
IN_WORDS = {"sources": "a list of sources", "eval_sources": "a list of sources", "optim": "name of an optimizer"}


def rows(heading):
    """Cells of the table under a heading."""
    section = PAGE.split(f"\n{heading}\n", 1)[1].split("\n#", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def expected_rows(schema):
    annotations = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if field.default is not dataclasses.MISSING:
            default = f"`{shown(field.default)}`"
        elif field.default_factory is not dataclasses.MISSING:
            default = f"`{shown(field.default_factory())}`"
        else:
            default = "needed"
        yield [f"`{field.name}`", IN_WORDS.get(field.name) or describe(annotations[field.name]), default]


@pytest.mark.parametrize("section", SCHEMAS)
def test_every_key_with_its_type_and_default(section):
    assert [row[:3] for row in rows(f"## `{section}`")] == list(expected_rows(SCHEMAS[section]))
    assert all(len(row) == 4 and row[3] for row in rows(f"## `{section}`"))


def test_every_refused_field_with_its_reason():
    assert rows("### Not in `train`") == [[f"`{key}`", REFUSED[key]] for key in sorted(REFUSED)]


def test_no_other_sections():
    assert re.findall(r"^## `(.+)`$", PAGE, re.MULTILINE) == [
        "model",
        "tokenizer",
        "data",
        "data.sources[]",
        "parallel",
        "train",
        "hub",
    ]
