"""Strict types: what fits, and the words for what was wanted."""

import enum
from typing import Any, Literal

import pytest

from neox_hf.config.annotations import describe, fits


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (int, [1, -3], [1.0, True, "1", None]),
        (float, [1, 2.5], [True, "1e-4", None, float("inf"), float("nan")]),
        (bool, [True], [0, 1, "true", None]),
        (str, ["x", ""], [1, True, None]),
        (float | None, [1, None], ["x", True]),
        (list[int], [[], [1]], [[True], ["1"], 1, (1,)]),
        (Literal["a", "b"], ["a"], ["c", 1, None]),
        (Literal["a"] | list[int], ["a", [1]], ["b", ["a"]]),
        (Colour | str, ["red"], ["green", 1]),
        (list[Colour] | str, [["red"], "anything"], [["green"]]),
        (dict, [{"a": 1}], [[], "a"]),
        (dict[str, bool] | None, [{"a": True}, None], [{"a": 1}, "a"]),
        (Any, [1, None, "x"], []),
    ],
)
def test_fits(annotation, good, bad):
    assert [value for value in good if not fits(annotation, value)] == []
    assert [value for value in bad if fits(annotation, value)] == []


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "a whole number"),
        (float | None, "a finite number or null"),
        (Literal["a", "b"] | None, "one of a, b or null"),
        (Literal[False] | str, "false or text"),
        (Colour | str, "one of red, blue"),
        (list[int], "a list, each item a whole number"),
        (dict[str, Any] | str, "a mapping or text"),
        (list, "a list"),
    ],
)
def test_describe(annotation, words):
    assert describe(annotation) == words


def test_an_annotation_that_no_file_can_express():
    with pytest.raises(TypeError, match=r"a schema uses .*bytes.*, which no recipe can express"):
        describe(bytes)
