"""Released weights, in every spelling that lies on the Hub, go straight into a model or are refused clearly."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from neox_hf.checkpoint import load_released_weights, released_files
from neox_hf.errors import CheckpointError, RecipeError
from neox_hf.parallel.topology import Topology
from tests.checkpoint.conftest import build
from tests.checkpoint.split_ranks import split_model
from tests.gloo import run_ranks

BUFFERS = {
    "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
    "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
    "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
}


def state_of(model: torch.nn.Module, head: str = "embed_out", dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """What a release holds: half precision, the head under its old name, buffers of old versions."""
    state = {name.replace("lm_head", head): tensor.to(dtype) for name, tensor in model.state_dict().items()}
    return {**state, **BUFFERS}


def release(folder: Path, state: dict[str, Tensor], files: int = 1) -> Path:
    """Write a folder as a release has it; with several files, an index too."""
    folder.mkdir(exist_ok=True)
    names = sorted(state)
    if files == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    places = {name: f"model-{at % files + 1:05}-of-{files:05}.safetensors" for at, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: state[name].clone() for name in names if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("head", ["embed_out", "lm_head"])
@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_spelling_is_read(build_model, tmp_path, head, files, dtype):
    model, other = build_model(seed=1), build_model(seed=2)
    load_released_weights(other, str(release(tmp_path, state_of(model, head, dtype), files)))
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(dtype).float()), name


def load_split(rank: int, folder: str) -> None:
    for sizes in ({"tensor": 2}, {"pipeline": 2}):
        topology = Topology.from_world(2, rank, **sizes).connect()
        model, truth = split_model(topology, seed=2), split_model(topology, seed=1)
        load_released_weights(model, folder, topology=topology)
        for ours, theirs in zip(model.parameters(), truth.parameters(), strict=True):
            assert ours.is_meta == theirs.is_meta
            assert ours.is_meta or torch.equal(ours, theirs.half().float())


def test_a_split_model_reads_its_own_parts(tmp_path):
    model = split_model(Topology.single(), seed=1)
    run_ranks(load_split, 2, str(release(tmp_path, state_of(model), files=2)))


def test_only_pickles_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(RecipeError, match=r"has its weights in pytorch_model\.bin alone, a pickle.*safetensors files"):
        released_files(str(tmp_path))


def test_no_weights_at_all(tmp_path):
    with pytest.raises(
        RecipeError, match=r"at 'v1' has neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        released_files(str(tmp_path), "v1")


@pytest.mark.parametrize("name", ["no/such-repository", "not a name"])
def test_a_repository_that_cannot_be_read(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match=f"model.pretrained={name!r} at 'main'"):
        released_files(name)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is no index of safetensors files"),
        ("[]", "is no index of safetensors files"),
        ('{"weight_map": {"a": "../x.safetensors"}}', r"points to '\.\./x\.safetensors', which is no safetensors file"),
        ('{"weight_map": {"a": "x.bin"}}', r"points to 'x\.bin', which is no safetensors file"),
        ('{"weight_map": {"a": "x.safetensors"}}', r"its index names x\.safetensors, which is missing"),
    ],
)
def test_an_index_that_cannot_be_followed(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(RecipeError, match=message):
        released_files(str(tmp_path))


def test_another_model_is_refused_and_unchanged(tmp_path):
    folder = release(tmp_path, state_of(build("stock", seed=1)))
    other = build("ours", seed=2, num_hidden_layers=3)
    before = other.lm_head.weight.clone()
    with pytest.raises(CheckpointError, match=r"the checkpoint's weights lack gpt_neox\.layers\.2\."):
        load_released_weights(other, str(folder))
    assert torch.equal(other.lm_head.weight, before)
