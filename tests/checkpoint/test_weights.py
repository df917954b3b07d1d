"""Weights go to disk under the ecosystem's names and come back whole, the LM head above all."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from neox_hf.checkpoint import CheckpointWriter, hf_names, open_checkpoint
from neox_hf.checkpoint.model_files import save_model_files
from neox_hf.checkpoint.weight_loading import load_weights
from neox_hf.checkpoint.weight_names import Weight
from neox_hf.checkpoint.weights import INDEX, plan_files
from neox_hf.errors import CheckpointError
from tests.checkpoint.conftest import SIZES, build, small_tokenizer


def save(model, output_dir, **settings):
    writer = CheckpointWriter(output_dir, 1)
    writer.write_weights(model, **settings)
    return open_checkpoint(writer.commit())


def assert_equal_weights(ours, theirs):
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_everything_comes_back(build_model, tmp_path, tied, dtype):
    model = build_model(seed=1, tie_word_embeddings=tied, dtype=dtype)
    other = build_model(seed=2, tie_word_embeddings=tied, dtype=dtype)
    head = other.get_output_embeddings().weight
    assert (head is other.get_input_embeddings().weight) == tied
    save(model, tmp_path).load_weights(other)
    assert_equal_weights(other, model)
    assert head is other.get_output_embeddings().weight


@pytest.mark.parametrize("tied", [False, True])
def test_names_on_disk(build_model, tmp_path, tied):
    model = build_model(tie_word_embeddings=tied)
    checkpoint = save(model, tmp_path)
    on_disk = load_file(checkpoint.path / "model.safetensors")
    assert set(hf_names(model).values()) == on_disk.keys()
    assert ("embed_out.weight" in on_disk) == (not tied)
    assert "lm_head.weight" not in on_disk
    assert set(hf_names(model)) == set(model.parameters())


@pytest.mark.parametrize("spelling", ["embed_out", "lm_head"])
def test_either_spelling_of_the_head_is_read(build_model, tmp_path, spelling):
    model, other = build_model(seed=1), build_model(seed=2)
    state = {name.replace("lm_head", spelling): tensor for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "x.safetensors")
    load_weights(other, [tmp_path / "x.safetensors"])
    assert_equal_weights(other, model)


def test_the_head_survives_where_the_stock_trainers_way_loses_it(build_model, tmp_path):
    model, fresh = build_model(seed=1), build_model(seed=2)
    checkpoint = save(model, tmp_path)
    lost = fresh.load_state_dict(load_file(checkpoint.path / "model.safetensors"), strict=False)
    assert lost.missing_keys == ["lm_head.weight"]
    checkpoint.load_weights(fresh)
    assert torch.equal(fresh.get_output_embeddings().weight, model.get_output_embeddings().weight)


def test_shards_and_their_index(build_model, tmp_path):
    model, other = build_model(seed=1), build_model(seed=2)
    checkpoint = save(model, tmp_path, shard_bytes=10_000)
    assert checkpoint.has(INDEX)
    assert len([name for name in checkpoint.manifest.paths() if name.startswith("model-")]) > 1
    checkpoint.load_weights(other)
    assert_equal_weights(other, model)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.path)
    assert_equal_weights(reloaded, model)


@pytest.mark.parametrize("tied", [False, True])
def test_another_dtype_on_the_way_to_disk(build_model, tmp_path, tied):
    model = build_model(seed=1, tie_word_embeddings=tied)
    checkpoint = save(model, tmp_path, dtype=torch.bfloat16)
    assert checkpoint.json("config.json")["dtype"] == "bfloat16"
    half = build_model(seed=2, tie_word_embeddings=tied, dtype=torch.bfloat16)
    checkpoint.load_weights(half)
    assert_equal_weights(half, model.to(torch.bfloat16))
    full = build_model(seed=2, tie_word_embeddings=tied)
    with pytest.raises(
        CheckpointError, match=r"is torch\.bfloat16 in model\.safetensors and torch\.float32 in the model"
    ):
        checkpoint.load_weights(full)
    checkpoint.load_weights(full, cast=True)
    assert_equal_weights(full, model.float())


def test_the_tokenizer_lies_beside(tmp_path):
    checkpoint = save(build("stock"), tmp_path, tokenizer=small_tokenizer())
    assert {"tokenizer.json", "tokenizer_config.json"} <= checkpoint.manifest.paths()
    assert len(transformers.AutoTokenizer.from_pretrained(checkpoint.path)) == SIZES["vocab_size"]


def test_no_pickle_is_written(tmp_path):
    paths = save(build("stock"), tmp_path).manifest.paths()
    assert {path.rsplit(".", 1)[-1] for path in paths} == {"json", "safetensors"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 3}, r"the checkpoint's weights lack gpt_neox\.layers\.2\..*, which the model has"),
        ({"num_hidden_layers": 1}, r"the checkpoint's weights hold gpt_neox\.layers\.1\..*, which the model lacks"),
        (
            {"vocab_size": 62},
            r"embed_in\.weight has shape \(61, 16\) in model\.safetensors and \(62, 16\) in the model",
        ),
        ({"tie_word_embeddings": True}, r"one tensor for gpt_neox\.embed_in\.weight and embed_out\.weight, .* has 2"),
        ({"dtype": torch.float64}, r"is torch\.float32 in model\.safetensors and torch\.float64 in the model"),
    ],
)
def test_another_model_is_refused_and_unchanged(build_model, tmp_path, settings, message):
    checkpoint = save(build_model(seed=1), tmp_path)
    other = build_model(seed=2, **settings)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_weights(other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_a_tied_checkpoint_does_not_fill_a_separate_head(build_model, tmp_path):
    checkpoint = save(build_model(tie_word_embeddings=True), tmp_path)
    with pytest.raises(CheckpointError, match=r"the checkpoint's weights lack embed_out\.weight"):
        checkpoint.load_weights(build_model())


def test_legacy_buffers_are_ignored(build_model, tmp_path):
    model, other = build_model(seed=1), build_model(seed=2)
    legacy = {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}
    save_file({**model.state_dict(), **legacy}, tmp_path / "x.safetensors")
    load_weights(other, [tmp_path / "x.safetensors"])
    assert_equal_weights(other, model)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    model = build("stock")
    for name in ("a.safetensors", "b.safetensors"):
        save_file(model.state_dict(), tmp_path / name)
    with pytest.raises(CheckpointError, match=r"is in two files, a\.safetensors and b\.safetensors"):
        load_weights(model, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


@pytest.mark.parametrize("target", ["../../x.safetensors", "other.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(tmp_path, target):
    writer = CheckpointWriter(tmp_path, 1)
    writer.write_weights(build("stock"))
    writer.write_json(INDEX, {"weight_map": {"embed_out.weight": target}})
    checkpoint = open_checkpoint(writer.commit())
    with pytest.raises(CheckpointError, match=r"index\.json points to .*the checkpoint's weights are in"):
        checkpoint.load_weights(build("stock"))


def test_a_checkpoint_without_weights(write_small, tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights in safetensors files"):
        open_checkpoint(write_small(tmp_path, 1)).load_weights(build("stock"))


def test_a_model_without_a_head_has_its_own_names(tmp_path):
    config = transformers.GPTNeoXConfig(**SIZES)
    model = transformers.GPTNeoXModel(config)
    other = transformers.GPTNeoXModel(config)
    assert set(hf_names(model).values()) == model.state_dict().keys()
    save(model, tmp_path).load_weights(other)
    assert_equal_weights(other, model)


class BrokenTokenizer:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def save_pretrained(self, directory):
        raise self.error


def test_a_tokenizer_that_cannot_be_written(tmp_path):
    # The tokenizers library reports a full disk as a bare Exception.
    error = Exception("No space left on device (os error 28)")
    with pytest.raises(CheckpointError, match="the tokenizer was not written: No space left on device"):
        save(build("stock"), tmp_path, tokenizer=BrokenTokenizer(error))
    with pytest.raises(TypeError, match="a mistake"):
        save_model_files(build("stock"), tmp_path / "x", BrokenTokenizer(TypeError("a mistake")))


def test_the_configuration_keeps_what_it_had(tmp_path):
    model = build("ours")
    plain = json.loads((save(model, tmp_path / "a").path / "config.json").read_text())
    cast = json.loads((save(model, tmp_path / "b", dtype=torch.float16).path / "config.json").read_text())
    assert {**plain, "dtype": "float16"} == cast


def weights_of_sizes(*sizes: int) -> tuple[list[Weight], dict[Weight, int]]:
    weights = [Weight((f"w{at}",), torch.empty(0), (size,), None) for at, size in enumerate(sizes)]
    return weights, {weight: weight.shape[0] for weight in weights}


def planned(sizes: list[int], stages: list[int], limit: int) -> list[tuple[str, list[str], int, int]]:
    weights, bytes_of = weights_of_sizes(*sizes)
    files = plan_files(weights, stages, bytes_of, limit)
    return [(file.name, [weight.name for weight in file.weights], file.stage, file.number) for file in files]


def test_files_are_filled_up_to_the_limit():
    assert planned([4, 6, 11, 3, 3, 5], [0] * 6, limit=10) == [
        ("model-00001-of-00004.safetensors", ["w0", "w1"], 0, 0),
        ("model-00002-of-00004.safetensors", ["w2"], 0, 1),
        ("model-00003-of-00004.safetensors", ["w3", "w4"], 0, 2),
        ("model-00004-of-00004.safetensors", ["w5"], 0, 3),
    ]


def test_a_file_belongs_to_one_stage():
    assert planned([1, 1, 1, 1], [0, 1, 0, 1], limit=10) == [
        ("model-00001-of-00002.safetensors", ["w0", "w2"], 0, 0),
        ("model-00002-of-00002.safetensors", ["w1", "w3"], 1, 0),
    ]
    assert planned([1, 1], [0, 0], limit=10) == [("model.safetensors", ["w0", "w1"], 0, 0)]
