"""Documents of pipeline stages become one of the whole model."""

from typing import Any

import pytest

from neox_hf.checkpoint.optimizer_document import check_alike, merge
from neox_hf.errors import CheckpointError

DECAY, NONE = {"weight_decay": 0.1}, {"weight_decay": 0.0}


def document(*groups: tuple[dict[str, float], list[str]]) -> dict[str, Any]:
    names = [name for _, members in groups for name in members]
    return {
        "optimizer": "AdamW",
        "slots": ["exp_avg"],
        "groups": [{"names": members, "hyper": hyper} for hyper, members in groups],
        "parameters": {name: {"shape": [2], "slots": {}, "scalars": {}} for name in names},
    }


def test_groups_are_matched_across_stages():
    whole = merge([document((DECAY, ["a"]), (NONE, ["b"])), document((DECAY, ["c"]), (NONE, ["d"]))])
    assert whole == document((DECAY, ["a", "c"]), (NONE, ["b", "d"]))


@pytest.mark.parametrize("stages", [[1, 0], [0, 1]])
def test_a_stage_may_lack_a_group(stages):
    parts = [document((DECAY, ["a"]), (NONE, ["b"])), document((NONE, ["c"]))]
    whole = merge([parts[number] for number in stages])
    assert [(group["hyper"], group["names"]) for group in whole["groups"]] == [(DECAY, ["a"]), (NONE, ["b", "c"])]
    assert whole["parameters"].keys() == {"a", "b", "c"}


def test_a_tied_parameter_of_two_stages_is_one():
    whole = merge([document((DECAY, ["embed", "a"])), document((DECAY, ["embed", "b"]))])
    assert whole["groups"] == [{"names": ["a", "b", "embed"], "hyper": DECAY}]


def test_groups_of_equal_settings_stay_apart():
    whole = merge([document((NONE, ["a"]), (NONE, ["b"])), document((NONE, ["c"]), (NONE, ["d"]))])
    assert [group["names"] for group in whole["groups"]] == [["a", "c"], ["b", "d"]]


def test_a_weight_decay_may_change_but_not_who_decays():
    saved = document((NONE, ["a"]), (NONE, ["b"]))
    check_alike(saved, document((DECAY, ["a"]), (NONE, ["b"])))
    saved = document((DECAY, ["a"]), (NONE, ["b"]))
    with pytest.raises(CheckpointError, match="a and b are in optimizer groups with different settings"):
        check_alike(saved, document((DECAY, ["a", "b"])))
