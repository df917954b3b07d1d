"""Every spelling that released files use loads with no missing key, and saving gives the ecosystem's names."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers import GPTNeoXConfig as StockConfig
from transformers.models.gpt_neox import modeling_gpt_neox as stock

import neox_hf


@pytest.fixture
def repository(make_config, tmp_path):
    """Write a Hub-like directory of random weights under the names that `spell` gives them; return what is in it."""

    def write(spell, extra=(), shards=1, **fields):
        config = StockConfig(**{k: v for k, v in make_config(**fields).to_dict().items() if k != "kernels"})
        torch.manual_seed(1)
        weights = stock.GPTNeoXForCausalLM(config).state_dict()
        weights = {name: torch.randn_like(value) for name, value in weights.items()}
        config.architectures = ["GPTNeoXForCausalLM"]
        config.save_pretrained(tmp_path)
        files = {spell(name): value for name, value in weights.items()} | dict(extra)
        if shards == 1:
            save_file(files, tmp_path / "model.safetensors", metadata={"format": "pt"})
            return weights
        names, index = sorted(files), {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            save_file({n: files[n] for n in names[shard::shards]}, tmp_path / file, metadata={"format": "pt"})
            index |= dict.fromkeys(names[shard::shards], file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        return weights

    return write


def as_released(name):
    return name.replace("lm_head", "embed_out")


def legacy_buffers(layers=2):
    for layer in range(layers):
        prefix = f"gpt_neox.layers.{layer}.attention."
        yield prefix + "bias", torch.ones(1, 1, 8, 8, dtype=torch.bool)
        yield prefix + "masked_bias", torch.tensor(-1e9)
        yield prefix + "rotary_emb.inv_freq", torch.full((1,), 7.0)


def load(directory, model_class=AutoModelForCausalLM, **options):
    model, report = model_class.from_pretrained(directory, output_loading_info=True, **options)
    return model, report


@pytest.mark.parametrize("spell", [as_released, str], ids=["embed_out", "lm_head"])
@pytest.mark.parametrize("legacy", [False, True], ids=["", "legacy buffers"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_spelling_loads(spell, legacy, shards, repository, tmp_path, tokens):
    weights = repository(spell, legacy_buffers() if legacy else (), shards)
    model, report = load(tmp_path)
    assert type(model) is neox_hf.GPTNeoXForCausalLM
    assert type(model.config) is neox_hf.GPTNeoXConfig
    assert not any(report.values()), report
    loaded = model.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert torch.equal(model.get_output_embeddings().weight, weights["lm_head.weight"])
    # The angles come from the configuration, whatever a file says.
    assert model.gpt_neox.rotary_emb.inv_freq[0] == 1.0
    theirs = stock.GPTNeoXForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(model(tokens()).logits, theirs(tokens()).logits, atol=1e-4)


def test_saving_gives_the_names_of_the_ecosystem(repository, tmp_path, tokens):
    weights = repository(as_released)
    model, _ = load(tmp_path)
    model.save_pretrained(tmp_path / "again")
    files = load_file(tmp_path / "again" / "model.safetensors")
    assert files.keys() == {as_released(name) for name in weights}
    assert torch.equal(files["embed_out.weight"], weights["lm_head.weight"])
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["architectures"] == ["GPTNeoXForCausalLM"]
    assert config["model_type"] == "gpt_neox"
    assert "auto_map" not in config
    assert torch.equal(load(tmp_path / "again")[0](tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize(
    ("auto_class", "model_class", "new"),
    [
        (AutoModel, neox_hf.GPTNeoXModel, set()),
        (AutoModelForSequenceClassification, neox_hf.GPTNeoXForSequenceClassification, {"score.weight"}),
        (
            AutoModelForTokenClassification,
            neox_hf.GPTNeoXForTokenClassification,
            {"classifier.weight", "classifier.bias"},
        ),
        (AutoModelForQuestionAnswering, neox_hf.GPTNeoXForQuestionAnswering, {"qa_outputs.weight", "qa_outputs.bias"}),
    ],
)
def test_other_heads_take_the_body_of_a_language_model(auto_class, model_class, new, repository, tmp_path):
    weights = repository(as_released, legacy_buffers())
    model, report = load(tmp_path, auto_class)
    assert type(model) is model_class
    assert set(report["missing_keys"]) == new
    body = getattr(model, "gpt_neox", model).state_dict()
    assert all(torch.equal(value, weights["gpt_neox." + name]) for name, value in body.items())
    assert torch.isfinite(torch.cat([p.flatten() for p in model.parameters()])).all()


def test_tied_head_is_one_tensor_and_written_once(make_model, tmp_path):
    model = make_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.gpt_neox.embed_in.weight
    model.save_pretrained(tmp_path)
    assert "embed_out.weight" not in load_file(tmp_path / "model.safetensors")
    loaded, report = load(tmp_path)
    assert not report["missing_keys"]
    assert loaded.lm_head.weight is loaded.gpt_neox.embed_in.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_resizing_keeps_the_old_rows(tied, make_model):
    model = make_model(tie_word_embeddings=tied)
    embedding, head = model.gpt_neox.embed_in.weight.clone(), model.lm_head.weight.clone()
    model.resize_token_embeddings(80)
    assert model.config.vocab_size == 80
    assert torch.equal(model.gpt_neox.embed_in.weight[:64], embedding)
    assert torch.equal(model.lm_head.weight[:64], head)
    assert (model.lm_head.weight is model.gpt_neox.embed_in.weight) == tied
    ids = torch.tensor([[79, 3]])
    output = model(ids, labels=ids)
    assert output.logits.shape == (1, 2, 80)
    assert torch.isfinite(output.loss)


def test_loads_in_half_precision(repository, tmp_path):
    weights = repository(as_released)
    model, _ = load(tmp_path, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"].to(torch.bfloat16))
    assert model.gpt_neox.rotary_emb.inv_freq.dtype == torch.float32


def test_registration_can_be_repeated_and_leaves_transformers_its_own(make_config):
    neox_hf.modeling.register()
    assert AutoConfig.for_model("gpt_neox").__class__ is neox_hf.GPTNeoXConfig
    assert type(AutoModelForCausalLM.from_config(make_config())) is neox_hf.GPTNeoXForCausalLM
    theirs = StockConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    assert type(AutoModelForCausalLM.from_config(theirs)) is stock.GPTNeoXForCausalLM


def test_a_configuration_of_transformers_own_class_is_refused():
    theirs = StockConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(ValueError, match=r"GPTNeoXForCausalLM wants a neox_hf.GPTNeoXConfig; found transformers\."):
        neox_hf.GPTNeoXForCausalLM(theirs)
    converted = neox_hf.GPTNeoXConfig.from_dict(theirs.to_dict())
    assert neox_hf.GPTNeoXForCausalLM(converted).num_parameters() > 0


def test_offloaded_weights_are_fetched(make_model, tmp_path, tokens):
    """accelerate brings a module's weights when it is called: the shared norm must not read them behind its back."""
    model = make_model().eval()
    wanted = model(tokens()).logits
    model.save_pretrained(tmp_path / "weights")
    placed = dict.fromkeys(["gpt_neox.embed_in", "gpt_neox.final_layer_norm", "gpt_neox.rotary_emb", "lm_head"], "cpu")
    offloaded, _ = load(
        tmp_path / "weights",
        device_map=placed | {"gpt_neox.layers": "disk"},
        offload_folder=str(tmp_path / "offload"),
    )
    assert offloaded.gpt_neox.layers[0].input_layernorm.weight.is_meta
    assert torch.allclose(offloaded(tokens()).logits, wanted, atol=1e-6)
