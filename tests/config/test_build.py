"""A mapping becomes a dataclass, and everything wrong with it is said at once, with its place."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from neox_hf.config import build, merge, read_override
from neox_hf.config.document import Document
from neox_hf.config.yaml_text import read_yaml
from neox_hf.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Item:
    path: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Paint:
    colour: Literal["red", "blue"] = "red"
    code: str | None = None
    coats: int = 1

    def __post_init__(self) -> None:
        if self.coats > 9:
            raise RecipeError("too many coats")


@dataclass(frozen=True, kw_only=True)
class House:
    paint: Paint = field(default_factory=Paint)
    second: Paint | None = None
    items: list[Item] = field(default_factory=list)
    rate: float = 0.5
    tall: bool = False


def house(text, *overrides, refused=None):
    file = Document(*read_yaml(text, lambda line: f"h.yaml:{line}"))
    return build(House, merge([file, *map(read_override, overrides)]), refused)


def refusal(text, *overrides, refused=None):
    with pytest.raises(RecipeError) as error:
        house(text, *overrides, refused=refused)
    return str(error.value)


def test_nested_values_and_defaults():
    built = house("paint: {colour: blue}\nitems: [{path: a}, {path: b, weight: 2}]\nrate: 1e-4\nsecond: {coats: 2}")
    assert built == House(
        paint=Paint(colour="blue"),
        second=Paint(coats=2),
        items=[Item(path="a"), Item(path="b", weight=2)],
        rate=1e-4,
    )
    assert house("second: null") == House()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rat: 1", "h.yaml:1: rat = 1: unknown key; did you mean rate?"),
        ("paint:\n  color: red", 'h.yaml:2: paint.color = "red": unknown key; did you mean paint.colour?'),
        ("coats: 2", "h.yaml:1: coats = 2: unknown key; did you mean paint.coats?"),
        ("paint: {tall: true}", "h.yaml:1: paint.tall = true: unknown key; did you mean tall?"),
        ("zzz: 2", "h.yaml:1: zzz = 2: unknown key"),
        ("rate: fast", 'h.yaml:1: rate = "fast": wants a finite number'),
        ("rate: true", "h.yaml:1: rate = true: wants a finite number"),
        ("rate: .nan", "h.yaml:1: rate = NaN: wants a finite number"),
        ("tall: yes", 'h.yaml:1: tall = "yes": wants true or false'),
        ("paint: {coats: 1.5}", "h.yaml:1: paint.coats = 1.5: wants a whole number"),
        ("paint: {colour: rod}", 'h.yaml:1: paint.colour = "rod": wants one of red, blue; did you mean red?'),
        ("paint: {colour: 7}", "h.yaml:1: paint.colour = 7: wants one of red, blue"),
        ("paint: {code: 12}", "h.yaml:1: paint.code = 12: wants text or null; put it in quotes"),
        ("paint: red", 'h.yaml:1: paint = "red": wants a mapping of keys to values'),
        ("items: {path: a}", 'h.yaml:1: items = {"path": "a"}: wants a list'),
        ("items:\n- weight: 2", 'h.yaml:2: items[0] = {"weight": 2}: the key path is missing'),
        ("items:\n- path: a\n- a", 'h.yaml:3: items[1] = "a": wants a mapping of keys to values'),
        ("paint:\n  coats: 10", 'h.yaml:1: paint = {"coats": 10}: too many coats'),
    ],
)
def test_refused(text, message):
    assert refusal(text) == message


def test_a_value_from_an_override_says_so():
    assert refusal("rate: 1", "rate=x") == "override 'rate=x': rate = \"x\": wants a finite number"


def test_a_refused_key_gives_its_reason():
    refused = {"paint.brush": "belongs to tools.brush"}
    assert refusal("paint: {brush: 1}", refused=refused) == "h.yaml:1: paint.brush = 1: belongs to tools.brush"


def test_all_problems_at_once_in_the_order_of_their_keys():
    text = "tall: 1\nrate: x\npaint: {coats: 10}\nitems: [{path: 1}]"
    assert refusal(text).splitlines() == [
        "4 problems:",
        "  h.yaml:4: items[0].path = 1: wants text; put it in quotes",
        '  h.yaml:3: paint = {"coats": 10}: too many coats',
        '  h.yaml:2: rate = "x": wants a finite number',
        "  h.yaml:1: tall = 1: wants true or false",
    ]


def test_a_long_value_is_cut_short():
    message = refusal(f"rate: {'x' * 500}")
    assert len(message) < 200
    assert "...: wants a finite number" in message
