"""What a recipe comes to, before any of it is built."""

import pytest

from neox_hf.config import Document, build, read_yaml
from neox_hf.errors import TopologyError
from neox_hf.training.dry_run import dry_run_report, fitting_worlds
from neox_hf.training.recipe import Recipe, load_recipe

SMALL = """
model: {num_hidden_layers: 2, hidden_size: 64, num_attention_heads: 4}
tokenizer: {kind: byte}
data: {sources: [{path: stdlib}], seq_length: 32, streams: 12}
train: {max_steps: 1000, per_device_train_batch_size: 2, global_batch_size: 24}
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return str(path)


def plan(recipe):
    lines = dry_run_report(recipe).splitlines()
    return [line.removeprefix("# ") for line in lines[lines.index("# plan") + 1 :]]


def test_the_plan_of_one_process(small):
    # 257 tokens become 384 rows; 2 x 384 x 64 + 2 x (12 x 64^2 + 13 x 64) + 2 x 64 parameters
    assert plan(load_recipe([small])) == [
        "parameters:      149,248 with a vocabulary of 384",
        "tokens per step: 768 = 24 samples x 32 tokens",
        "tokens in total: 768,000 in 1,000 steps",
        "world:           1 = 1 pipeline x 1 data x 1 tensor; 2 samples at a time, 12 times a step",
        "ZeRO:            stage 0",
        "worlds that fit: 1, 2, 3, 4, 6, 12",
    ]


def test_the_plan_of_three_processes(small, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    lines = plan(load_recipe([small]))
    assert lines[3] == "world:           3 = 1 pipeline x 3 data x 1 tensor; 2 samples at a time, 4 times a step"
    assert lines[5] == "data groups:     1 of 3; the first is 0, 1, 2"


def test_the_plan_of_a_split_model(small):
    """Without a launcher it is the plan of the smallest world that fits."""
    recipe = load_recipe([small], overrides=["parallel={tensor: 2, pipeline: 2, offload: optimizer}"])
    # An embedding or a head: 512 / 2 x 64. A layer: (12 x 64^2 + 7 x 64) / 2 + 6 x 64. The last norm: 2 x 64.
    assert plan(recipe)[3:] == [
        "world:           4 = 2 pipeline x 1 data x 2 tensor; 2 samples at a time, 12 times a step",
        "ZeRO:            stage 1, optimizer offloaded to the host",
        "pipeline groups: 2 of 2; the first is 0, 2",
        "tensor groups:   2 of 2; the first is 0, 1",
        "stage 0:         layers 0 to 0, 41,568 parameters on each rank",
        "stage 1:         layers 1 to 1, 41,696 parameters on each rank",
        "worlds that fit: 4, 8, 12, 16, 24, 48",
    ]


def test_large_groups_are_shown_by_their_ends(small, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "12")
    assert "data groups:     1 of 12; the first is 0, 1, 2 ... 11" in plan(load_recipe([small]))


def test_a_split_world_that_is_too_small(small, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = load_recipe([small], overrides=["parallel={tensor: 2, pipeline: 2}"])
    with pytest.raises(TopologyError, match=r"takes 4 processes, or a multiple of that, and the world has 2; launch"):
        dry_run_report(recipe)


def test_a_world_that_does_not_fit(small, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(TopologyError, match=r"data.streams = 12 cannot be dealt evenly to 5 data-parallel ranks"):
        dry_run_report(load_recipe([small]))


def test_without_a_global_batch_the_streams_decide(small):
    assert fitting_worlds(load_recipe([small], overrides=["train.global_batch_size=null"])) == [1, 2, 3, 4, 6, 12]


@pytest.mark.parametrize("override", ["train.eval_strategy=steps", "train.eval_on_start=true"])
def test_an_evaluation_is_dealt_evenly_too(small, override):
    samples = ["data.eval_samples=16", "train.per_device_eval_batch_size=2"]
    assert fitting_worlds(load_recipe([small], overrides=samples)) == [1, 2, 3, 4, 6, 12]
    assert fitting_worlds(load_recipe([small], overrides=[*samples, override])) == [1, 2, 4]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("tokenizer.kind=char", "depend on the vocabulary of the char tokenizer, which --dry-run does not load"),
        ("model.vocab_size=512", "165,632 with a vocabulary of 512"),
        ("tokenizer={kind: trained, vocab_size: 385}", "165,632 with a vocabulary of 512"),
    ],
)
def test_who_decides_the_vocabulary(small, override, line):
    assert plan(load_recipe([small], overrides=[override]))[0] == f"parameters:      {line}"


def test_released_weights_bring_their_own_parameters(tmp_path, small):
    path = tmp_path / "tuned.yaml"
    path.write_text(SMALL.replace("num_hidden_layers: 2, hidden_size: 64, num_attention_heads: 4", "pretrained: me/it"))
    assert plan(load_recipe([str(path)]))[0] == "parameters:      those of me/it"


def test_the_report_is_a_recipe(small, tmp_path):
    """The plan stands in comments, so what is printed can be kept as a file and run."""
    recipe = load_recipe([small])
    values, origins = read_yaml(dry_run_report(recipe), str)
    assert build(Recipe, Document(values, origins)) == recipe
