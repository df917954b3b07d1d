"""A checkpoint is there whole or not there; several ranks write one."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from neox_hf.checkpoint import Box, CheckpointWriter, fill_boxes, find_latest, open_checkpoint
from neox_hf.checkpoint.directory import recover
from neox_hf.errors import CheckpointError
from tests.checkpoint.conftest import build


def test_what_was_written_is_read(write_small, tmp_path):
    path = write_small(tmp_path, 4, value=2.5)
    assert path == tmp_path / "checkpoint-4"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-4"]
    checkpoint = open_checkpoint(path)
    assert checkpoint.manifest.metadata == {"consumed_samples": 32}
    assert checkpoint.json("state/data.json") == {"value": 2.5}
    target = torch.zeros(4, 3)
    fill_boxes([Box.whole("a.weight", target)], checkpoint.boxes("optimizer.exp_avg"))
    assert torch.equal(target, torch.full((4, 3), 2.5))


def test_only_listed_files_are_opened(write_small, tmp_path):
    path = write_small(tmp_path, 4)
    (path / "state" / "late.json").write_text("{}")
    checkpoint = open_checkpoint(path)
    assert checkpoint.has("state/data.json")
    assert not checkpoint.has("state/late.json")
    with pytest.raises(CheckpointError, match=r"checkpoint-4 holds no state/late\.json"):
        checkpoint.json("state/late.json")
    with pytest.raises(CheckpointError, match=r"checkpoint-4 holds no optimizer\.master"):
        checkpoint.boxes("optimizer.master")


def test_two_ranks_write_one_checkpoint(tmp_path):
    meeting = threading.Barrier(2, timeout=30)
    whole = torch.arange(12.0).reshape(4, 3)

    def run(rank: int):
        writer = CheckpointWriter(tmp_path, 5, rank=rank, world_size=2, barrier=meeting.wait)
        half = Box("w", (2 * rank, 0), (4, 3), whole[2 * rank : 2 * rank + 2])
        writer.write_boxes("optimizer.exp_avg", [half])
        writer.write_tensors("rng", {"seed": torch.tensor(rank)}, {"rank": str(rank)})
        if rank == 0:
            writer.write_json("trainer_state.json", {"global_step": 5})
        return writer.commit({"by": rank})

    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(run, range(2)))
    assert paths == [tmp_path / "checkpoint-5"] * 2
    checkpoint = open_checkpoint(paths[0])
    assert (checkpoint.manifest.world_size, checkpoint.manifest.metadata) == (2, {"by": 0})
    assert "state/optimizer.exp_avg-1-of-2.safetensors" in checkpoint.manifest.paths()
    assert not list(paths[0].rglob("done-*"))
    target = torch.zeros(4, 3)
    fill_boxes([Box.whole("w", target)], checkpoint.boxes("optimizer.exp_avg"))
    assert torch.equal(target, whole)
    tensors, header = checkpoint.tensors("rng", 1)
    assert (tensors["seed"].item(), header["rank"]) == (1, "1")


def test_a_checkpoint_of_the_same_step_is_replaced(write_small, tmp_path):
    write_small(tmp_path, 4, value=1.0)
    path = write_small(tmp_path, 4, value=2.0)
    assert open_checkpoint(path).json("state/data.json") == {"value": 2.0}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-4"]


def test_two_ranks_must_not_write_one_path(tmp_path):
    writer = CheckpointWriter(tmp_path, 1, world_size=2)
    writer.write_json("x.json", 0)
    other = CheckpointWriter(tmp_path, 1, rank=1, world_size=2)
    other.write_json("x.json", 1)
    other.seal()
    with pytest.raises(CheckpointError, match=r"x\.json was written by rank 1 and by another rank"):
        writer.commit()
    assert find_latest(tmp_path).path is None


def test_a_rank_that_does_not_see_the_directory(tmp_path):
    with pytest.raises(CheckpointError, match=r"rank 3 does not see .*tmp-checkpoint-1.*must be shared by all ranks"):
        CheckpointWriter(tmp_path, 1, rank=3, world_size=4)


def test_a_path_must_stay_inside(tmp_path):
    with pytest.raises(AssertionError, match="not a plain path"):
        CheckpointWriter(tmp_path, 1).write_json("../x.json", 0)


def test_a_stem_has_one_box_per_place(tmp_path):
    box = Box.whole("w", torch.zeros(2))
    with pytest.raises(AssertionError, match="w is given twice"):
        CheckpointWriter(tmp_path, 1).write_boxes("x", [box, box])


def test_stale_work_is_removed_and_what_was_set_aside_comes_back(write_small, tmp_path, caplog):
    write_small(tmp_path, 3)
    write_small(tmp_path, 4)
    os.rename(tmp_path / "checkpoint-4", tmp_path / "old-checkpoint-4")
    for name in ("tmp-checkpoint-5", "tmp-removed-checkpoint-1", "tmp-final", "tmp-mine"):
        (tmp_path / name / "state").mkdir(parents=True)
    assert find_latest(tmp_path).path == tmp_path / "old-checkpoint-4"
    recover(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4", "tmp-mine"]
    assert "put" in caplog.text
    assert "tmp-checkpoint-5, which was never finished" in caplog.text


def test_what_was_set_aside_goes_when_its_successor_is_there(write_small, tmp_path):
    write_small(tmp_path, 4, value=1.0)
    os.rename(tmp_path / "checkpoint-4", tmp_path / "old-checkpoint-4")
    os.rename(tmp_path / "old-checkpoint-4", tmp_path / "kept")
    write_small(tmp_path, 4, value=2.0)
    os.rename(tmp_path / "kept", tmp_path / "old-checkpoint-4")
    (tmp_path / "tmp-removed-checkpoint-4").mkdir()
    recover(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-4"]
    assert open_checkpoint(tmp_path / "checkpoint-4").json("state/data.json") == {"value": 2.0}


def test_the_weights_lie_where_transformers_looks(small_checkpoint):
    assert "embed_out.weight" in load_file(small_checkpoint / "model.safetensors")
    assert json.loads((small_checkpoint / "config.json").read_text())["model_type"] == "gpt_neox"
    assert not (small_checkpoint / "weights").exists()


def test_replicas_take_turns_with_the_files_of_weights(tmp_path):
    model = build("stock")
    writers = [CheckpointWriter(tmp_path, 1, rank=rank, world_size=2) for rank in range(2)]
    for writer in writers:
        writer.write_weights(model, shard_bytes=10_000)
    wrote = [{name for name in writer._sums if name.endswith(".safetensors")} for writer in writers]
    assert all(wrote)
    assert not wrote[0] & wrote[1]
    index = json.loads((writers[0].path / "model.safetensors.index.json").read_text())
    assert wrote[0] | wrote[1] == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == 4 * index["metadata"]["total_parameters"] == 4 * model.num_parameters()
