"""Weights and optimizer state of models that are split over tensor and pipeline ranks."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from neox_hf.checkpoint import hf_names, open_checkpoint, write_final
from neox_hf.errors import CheckpointError
from neox_hf.parallel.topology import Topology
from tests.checkpoint.split_ranks import SLOTS, check_load, load_split, save, save_split, split_model, wanted
from tests.gloo import run_ranks

LAYOUTS = [{"tensor": 2, "pipeline": 2}, {"tensor": 2}, {"pipeline": 2}, {"tensor": 4}, {}]


def check_directory(path: Path, tied: bool) -> None:
    """What lies on disk is the whole model, each element once, and stock transformers reads it."""
    model = split_model(Topology.single(), seed=1, tied=tied)
    weights = {}
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        assert not weights.keys() & tensors.keys()
        weights.update(tensors)
    assert weights.keys() == set(hf_names(model).values())
    for parameter, name in hf_names(model).items():
        assert torch.equal(weights[name], parameter)
    reloaded = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(reloaded.get_output_embeddings().weight, model.get_output_embeddings().weight)

    checkpoint = open_checkpoint(path)
    saved = checkpoint.json("state/optimizer.json")
    assert saved["parameters"].keys() == weights.keys()
    assert [len(group["names"]) for group in saved["groups"]] == [
        sum(tensor.ndim > 1 for tensor in weights.values()),
        sum(tensor.ndim < 2 for tensor in weights.values()),
    ]
    for slot in SLOTS:
        boxes = checkpoint.boxes(f"optimizer.{slot}")
        assert boxes.names() == weights.keys()
        for name, tensor in weights.items():
            whole = torch.full(tensor.shape, torch.nan)
            for box in boxes.find(name):
                places = zip(box.offsets, box.extent, strict=True)
                target = whole[tuple(slice(start, start + length) for start, length in places)]
                assert target.isnan().all(), f"{name} is written twice"
                target.copy_(boxes.read(box, tuple(slice(0, n) for n in box.extent)))
            assert torch.equal(whole, wanted(name, slot, tuple(tensor.shape)))


@pytest.mark.parametrize(
    ("sizes", "tied", "deferred"),
    [
        ({"tensor": 2, "pipeline": 2}, False, True),
        ({"tensor": 2, "pipeline": 2}, True, False),
        ({"tensor": 2}, False, False),
        ({"pipeline": 2}, True, False),
    ],
)
def test_four_ranks_save_what_any_layout_loads(tmp_path, sizes, tied, deferred):
    run_ranks(save_split, 4, str(tmp_path), sizes, tied, deferred, 10_000)
    path = tmp_path / "checkpoint-3"
    check_directory(path, tied)
    check_load(Topology.single(), path, tied)
    run_ranks(load_split, 4, str(path), LAYOUTS, tied)


def test_one_rank_saves_what_any_layout_loads(tmp_path):
    save(Topology.single(), tmp_path, tied=False)
    check_directory(tmp_path / "checkpoint-3", tied=False)
    run_ranks(load_split, 4, str(tmp_path / "checkpoint-3"), LAYOUTS, False)


def test_files_hold_one_stage_each_and_one_file_needs_no_index(tmp_path):
    run_ranks(save_split, 2, str(tmp_path / "stages"), {"pipeline": 2}, False, False, 10**9)
    index = json.loads((tmp_path / "stages" / "checkpoint-3" / "model.safetensors.index.json").read_text())
    places = index["weight_map"]
    assert set(places.values()) == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert places["gpt_neox.embed_in.weight"] == places["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    assert places["embed_out.weight"] == places["gpt_neox.layers.2.mlp.dense_h_to_4h.weight"]
    run_ranks(save_split, 2, str(tmp_path / "tensors"), {"tensor": 2}, False, False, 10**9)
    assert [path.name for path in (tmp_path / "tensors" / "checkpoint-3").glob("model*")] == ["model.safetensors"]


def write_final_split(rank: int, folder: str) -> None:
    topology = Topology.from_world(4, rank, tensor=2, pipeline=2).connect()
    for seed in (5, 1):
        write_final(
            split_model(topology, seed), None, folder, {"README.md": b"# card"}, topology=topology, shard_bytes=10_000
        )


def test_the_final_model_of_a_split_run(tmp_path):
    run_ranks(write_final_split, 4, str(tmp_path))
    model, reloaded = split_model(Topology.single(), seed=1), AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, reloaded.state_dict()[name]), name
    assert not (tmp_path / "tmp-final").exists()


def refuse_on_one_rank(rank: int, path: str) -> str:
    topology = Topology.from_world(2, rank, tensor=2)
    model = split_model(topology, seed=2)
    before = [parameter.clone() for parameter in model.parameters()]
    checkpoint = open_checkpoint(path)
    if rank == 1:
        checkpoint._known.discard("model.safetensors")
    with pytest.raises(CheckpointError) as refused:
        checkpoint.load_weights(model, topology=topology)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return str(refused.value)


def test_what_one_rank_refuses_no_rank_loads(tmp_path):
    save(Topology.single(), tmp_path, tied=False)
    for message in run_ranks(refuse_on_one_rank, 2, str(tmp_path / "checkpoint-3")):
        assert "holds no weights in safetensors files" in message
