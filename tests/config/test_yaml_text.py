"""Scalars as YAML 1.2 reads them, the place of each value, and every text that is refused."""

import pytest
import yaml

from neox_hf.config.yaml_text import dump_yaml, read_yaml
from neox_hf.errors import RecipeError


def read(text):
    return read_yaml(text, lambda line: f"a.yaml:{line}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),  # a string in YAML 1.1
        ("6E+3", 6000.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("'1e-4'", "1e-4"),
        ("1_000", 1000),
        ("0x10", 16),
        ("010", "010"),  # 8 in YAML 1.1
        ("1:30", "1:30"),  # 90 in YAML 1.1
        ("no", "no"),  # false in YAML 1.1
        ("on", "on"),
        ("true", True),
        ("2024-01-01", "2024-01-01"),  # a date in YAML 1.1
        ("~", None),
        ("", None),
        ("[1, {a: b}]", [1, {"a": "b"}]),
    ],
)
def test_plain_scalars(text, value):
    result = read(f"key: {text}")[0]["key"]
    assert result == value
    assert type(result) is type(value)


def test_every_path_has_its_line():
    _, origins = read("model:\n  name: x\ndata:\n  sources:\n    - path: a\n    - path: b\n")
    assert origins == {
        ("model",): "a.yaml:1",
        ("model", "name"): "a.yaml:2",
        ("data",): "a.yaml:3",
        ("data", "sources"): "a.yaml:4",
        ("data", "sources", 0): "a.yaml:5",
        ("data", "sources", 0, "path"): "a.yaml:5",
        ("data", "sources", 1): "a.yaml:6",
        ("data", "sources", 1, "path"): "a.yaml:6",
    }


def test_an_alias_repeats_its_value():
    assert read("a: &x {b: 1}\nc: *x")[0] == {"a": {"b": 1}, "c": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "a.yaml:3: a is given twice, first in line 1; keep one"),
        ("t:\n  a: 1\n  a: 1", "a.yaml:3: t.a is given twice, first in line 2; keep one"),
        ("1: 2", "a.yaml:1: the top level: a key must be a name, found 1"),
        ("t: {[a]: 1}", "a.yaml:1: t: a key must be a name, found None"),
        ("a: !!python/name:os.system x", "a.yaml:1: a: the tag tag:yaml.org,2002:python/name:os.system is not allowed"),
        ("a:\n  !!set {b}", "a.yaml:2: a: the tag tag:yaml.org,2002:set is not allowed"),
        ("a: !!int x", "a.yaml:1: a = x: is no tag:yaml.org,2002:int"),
        ("a: !!bool x", "a.yaml:1: a = x: is no tag:yaml.org,2002:bool"),
        ("a: &x [*x]", "a.yaml:1: a[0]: the alias refers to the value it stands in"),
        ("a: 1\nb: [1", "a.yaml:2: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\n---\nb: 1", "a.yaml:2: not valid YAML: but found another document"),
        ("a: *x", "a.yaml:1: not valid YAML: found undefined alias 'x'"),
        ("a: 1\nb: \x01", "a.yaml:2: not valid YAML: special characters are not allowed (#x0001)"),
    ],
)
def test_refused(text, message):
    with pytest.raises(RecipeError) as error:
        read(text)
    assert str(error.value) == message


def test_what_is_dumped_reads_back_under_both_versions_of_yaml():
    values = {"a": "1e-4", "b": "no", "c": 1e-5, "d": None, "e": [1, {"f": True}], "g": "x: y", "h": "0x10", "i": "ä"}
    text = dump_yaml(values)
    assert read(text)[0] == values
    assert yaml.safe_load(text) == values
    assert list(read(text)[0]) == list(values)


def test_a_value_dumped_twice_is_written_twice():
    shared = [1]
    assert "&" not in dump_yaml({"a": shared, "b": shared})
