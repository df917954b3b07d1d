"""The final model replaces the earlier one file by file, and never as a mixture of both."""

import os

import pytest
import torch
import transformers

from neox_hf.checkpoint import write_final
from neox_hf.checkpoint.weights import INDEX
from neox_hf.errors import CheckpointError
from tests.checkpoint.conftest import build


def constant(value: float) -> transformers.PreTrainedModel:
    model = build("stock")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def values_in(output_dir) -> set[float]:
    """Every value that occurs in the model which the directory loads as."""
    model = transformers.AutoModelForCausalLM.from_pretrained(output_dir)
    return {value for parameter in model.parameters() for value in parameter.unique().tolist()}


def test_the_final_model_lies_in_the_output_directory(build_model, tmp_path):
    model = build_model(seed=1)
    (tmp_path / "checkpoint-1").mkdir()
    assert write_final(model, None, tmp_path, {"README.md": b"# card", "figures/loss.png": b"png"}) == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "checkpoint-1",
        "config.json",
        "figures",
        "generation_config.json",
        "model.safetensors",
    ]
    assert (tmp_path / "figures" / "loss.png").read_bytes() == b"png"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight)


SIZES = {"one file": 10**9, "shards": 10_000}


@pytest.mark.parametrize("old", SIZES)
@pytest.mark.parametrize("new", SIZES)
def test_the_earlier_model_is_replaced_whole(tmp_path, old, new):
    write_final(constant(1.0), None, tmp_path, shard_bytes=SIZES[old])
    write_final(constant(2.0), None, tmp_path, shard_bytes=SIZES[new])
    assert values_in(tmp_path) == {2.0}
    assert (tmp_path / INDEX).exists() == (new == "shards")
    assert (tmp_path / "model.safetensors").exists() == (new == "one file")
    assert not (tmp_path / "tmp-final").exists()


@pytest.mark.parametrize("old", SIZES)
@pytest.mark.parametrize("new", SIZES)
def test_stopped_anywhere_it_is_no_mixture(tmp_path, monkeypatch, old, new):
    replace, stop_before, seen = os.replace, 0, []
    finished = False
    while not finished:
        write_final(constant(1.0), None, tmp_path, shard_bytes=SIZES[old])
        calls = 0

        def stopping(source, target, limit=stop_before):
            nonlocal calls
            calls += 1
            if calls > limit:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr("os.replace", stopping)
            try:
                write_final(constant(2.0), None, tmp_path, shard_bytes=SIZES[new])
                finished = True
            except KeyboardInterrupt:
                stop_before += 1
        seen.append(outcome(tmp_path))
    assert seen[0] == "old" if not old == new == "shards" else seen[0] == "none"
    assert seen[-1] == "new"
    assert "mixture" not in seen


def outcome(output_dir) -> str:
    try:
        values = values_in(output_dir)
    except OSError:
        return "none"
    return {(1.0,): "old", (2.0,): "new"}.get(tuple(values), "mixture")


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*file/run"):
        write_final(constant(1.0), None, tmp_path / "file" / "run")


def test_an_extra_file_must_stay_inside(tmp_path):
    with pytest.raises(AssertionError, match="not a plain path inside the output directory"):
        write_final(constant(1.0), None, tmp_path, {"../x": b""})
