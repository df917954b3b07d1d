"""`section.key=value` from the command line."""

import pytest

from neox_hf.config.overrides import is_override, read_override
from neox_hf.errors import RecipeError


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("train.learning_rate=1e-4", {"train": {"learning_rate": 1e-4}}),
        ("model=pythia-160m", {"model": "pythia-160m"}),
        ("data.sources=[{path: stdlib, weight: 2}]", {"data": {"sources": [{"path": "stdlib", "weight": 2}]}}),
        ("train.run_name=", {"train": {"run_name": None}}),
        ("train.run_name=a=b", {"train": {"run_name": "a=b"}}),
        ("a.b.c={d: [1]}", {"a": {"b": {"c": {"d": [1]}}}}),
    ],
)
def test_values(argument, values):
    document = read_override(argument)
    assert document.values == values
    path = tuple(argument.partition("=")[0].split("."))
    assert document.origins[path] == f"override '{argument}'"


def test_every_part_of_the_value_has_its_place():
    argument = "data.sources=[{path: stdlib}]"
    assert read_override(argument).origins[("data", "sources", 0, "path")] == f"override '{argument}'"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train.seed", "override 'train.seed': an override is written section.key=value"),
        ("=1", "override '=1': '' is not a key; an override is written section.key=value"),
        (
            "train..seed=1",
            "override 'train..seed=1': 'train..seed' is not a key; an override is written section.key=value",
        ),
        ("a=[1", "override 'a=[1': not valid YAML: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_refused(argument, message):
    with pytest.raises(RecipeError) as error:
        read_override(argument)
    assert str(error.value) == message


def test_a_file_name_is_no_override():
    assert is_override("train.seed=1")
    assert is_override("model=x")
    assert not is_override("recipes/demo.yaml")
    assert not is_override("runs/lr=1e-4/recipe.yaml")
    assert not is_override("--config=a.yaml")
