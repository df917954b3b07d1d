"""The configuration on disk is everybody's; its own fields are checked."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers import GPTNeoXConfig as StockConfig

from neox_hf import GPTNeoXConfig


def saved(config, directory):
    config.save_pretrained(directory)
    return json.loads((directory / "config.json").read_text())


def test_both_spellings_of_rotary_are_written(make_config, tmp_path):
    fields = saved(make_config(rotary_pct=0.5, rotary_emb_base=500.0), tmp_path)
    assert fields["model_type"] == "gpt_neox"
    assert fields["rotary_pct"] == 0.5
    assert fields["rotary_emb_base"] == 500.0
    assert fields["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("config_class", [GPTNeoXConfig, StockConfig, AutoConfig])
def test_reloads_equal(config_class, make_config, tmp_path):
    config = make_config(rotary_pct=0.5, init_method="small_init", output_layer_init_method="wang_init")
    saved(config, tmp_path)
    loaded = config_class.from_pretrained(tmp_path)
    assert loaded.rope_parameters == config.rope_parameters
    assert loaded.init_method == "small_init"
    assert isinstance(loaded, StockConfig)
    assert isinstance(loaded, GPTNeoXConfig) == (config_class is not StockConfig)


@pytest.mark.parametrize(
    "fields",
    [
        {"rotary_pct": 1.0, "rotary_emb_base": 500},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500, "partial_rotary_factor": 1.0}},
    ],
    ids=["legacy", "v5"],
)
def test_either_spelling_is_read(fields, make_config, tmp_path):
    written = saved(make_config(), tmp_path)
    for name in ("rotary_pct", "rotary_emb_base", "rope_parameters"):
        del written[name]
    (tmp_path / "config.json").write_text(json.dumps(written | fields))
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.rotary_pct, config.rotary_emb_base) == (1.0, 500)
    assert config.rope_parameters["partial_rotary_factor"] == 1.0


def test_rotary_names_can_be_set(make_config):
    config = make_config()
    config.rotary_pct = 1.0
    config.rotary_emb_base = 2.0
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 2.0, "partial_rotary_factor": 1.0}


def test_choice_of_kernels_stays_on_this_machine(make_config, tmp_path):
    config = make_config(kernels="torch")
    assert "kernels" not in saved(config, tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).kernels == "auto"
    assert AutoConfig.from_pretrained(tmp_path, kernels="torch").kernels == "torch"
    assert GPTNeoXConfig.from_dict(config.to_dict()).kernels == "torch"


def test_impossible_values_are_refused(make_config):
    with pytest.raises(StrictDataclassError, match="init_method='small' is unknown; choose one of normal, scaled_norm"):
        make_config(init_method="small")
    with pytest.raises(StrictDataclassError, match="output_layer_init_method='wang' is unknown"):
        make_config(output_layer_init_method="wang")
    with pytest.raises(StrictDataclassError, match="kernels='cuda' is unknown; choose one of auto, triton, torch"):
        make_config(kernels="cuda")
    for factor in (-0.5, 2.0):
        with pytest.raises(
            StrictDataclassError, match=f"rotary_pct={factor} of each head is to be rotated; choose from"
        ):
            make_config(rotary_pct=factor)
    with pytest.raises(StrictDataclassError, match="hidden_size"):
        make_config(hidden_size="32")


def test_sharding_plan_names_our_modules(make_config, make_model):
    names = {name for name, _ in make_model().gpt_neox.named_children()}
    plan = make_config().base_model_fsdp_plan
    assert {key.split(".")[0] for key in plan} <= names
    assert {key.split(".")[0] for key in make_config().base_model_tp_plan} <= names
