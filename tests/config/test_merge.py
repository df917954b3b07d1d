"""Later documents win: mappings merge, everything else is replaced, and places follow the values."""

from neox_hf.config.document import Document
from neox_hf.config.merge import merge
from neox_hf.config.overrides import read_override
from neox_hf.config.yaml_text import read_yaml


def document(text, name):
    return Document(*read_yaml(text, lambda line: f"{name}:{line}"))


def test_mappings_merge_and_lists_are_replaced():
    merged = merge([document("a: {x: 1, y: [1, 2, 3]}\nb: 1", "one"), document("a: {y: [9], z: 2}", "two")])
    assert merged.values == {"a": {"x": 1, "y": [9], "z": 2}, "b": 1}


def test_places_follow_the_values():
    one = document("a:\n  x: 1\n  y:\n    - 1\n    - 2", "one")
    merged = merge([one, document("a:\n  y: [9]", "two"), read_override("a.z=5")])
    assert merged.origin(("a", "x")) == "one:2"
    assert merged.origin(("a", "y", 0)) == "two:2"
    assert ("a", "y", 1) not in merged.origins  # it was in the list that is gone
    assert merged.origin(("a", "z")) == "override 'a.z=5'"
    assert merged.origin(("a", "w")) == "override 'a.z=5' (default value)"
    assert merged.origin(("nowhere", "b")) == "default value"


def test_null_and_mappings_replace_each_other():
    assert merge([document("a: {x: 1}", "one"), document("a: null", "two")]).values == {"a": None}
    assert merge([document("a: null", "one"), document("a: {x: 1}", "two")]).values == {"a": {"x": 1}}
    assert merge([document("a: [1]", "one"), document("a: {x: 1}", "two")]).values == {"a": {"x": 1}}


def test_the_inputs_stay_as_they_were():
    one = document("a: {x: 1}", "one")
    merge([one, document("a: {x: 2}", "two")])
    assert one.values == {"a": {"x": 1}}


def test_a_shorthand_starts_its_section_anew():
    one = document("model: {width: 5, name: x}", "one")
    short = document("model: big", "two")
    assert merge([one, short], {"model": "name"}).values == {"model": {"name": "big"}}
    more = merge([one, short, read_override("model.width=7")], {"model": "name"})
    assert more.values == {"model": {"name": "big", "width": 7}}
    assert more.origin(("model", "name")) == "two:1"


def test_nothing_merges_to_nothing():
    assert merge([]) == Document()
