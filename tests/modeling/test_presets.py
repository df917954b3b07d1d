"""Released sizes: exact parameter counts, initial spread, names."""

import pytest
import torch

from neox_hf import PRESETS, GPTNeoXForCausalLM, preset_config
from neox_hf.errors import RecipeError
from neox_hf.modeling import flops_per_token, parameter_count

# name: parameters, head size, rotated width, FLOPs per token of GPT-NeoX's own formula (None: not tabulated)
TABLE = {
    "pythia-14m": (14_067_712, 32, 8, None),
    "pythia-31m": (30_494_720, 32, 8, None),
    "pythia-70m": (70_426_624, 64, 16, 3.05e8),
    "pythia-160m": (162_322_944, 64, 16, 9.10e8),
    "pythia-410m": (405_334_016, 64, 16, 2.65e9),
    "pythia-1b": (1_011_781_632, 256, 64, 6.10e9),
    "pythia-1.4b": (1_414_647_808, 128, 32, 8.92e9),
    "pythia-2.8b": (2_775_208_960, 80, 20, 1.77e10),
    "pythia-6.9b": (6_857_302_016, 128, 32, 4.28e10),
    "pythia-12b": (11_846_072_320, 128, 32, 7.37e10),
    "gpt-neox-20b": (20_554_567_680, 96, 24, 1.276e11),
}


def on_meta(config):
    with torch.device("meta"):
        return GPTNeoXForCausalLM(config)


def test_table_is_complete():
    assert set(TABLE) == set(PRESETS)


@pytest.mark.parametrize("name", TABLE)
def test_size(name):
    parameters, head_size, rotated, flops = TABLE[name]
    config = preset_config(name)
    model = on_meta(config)
    assert model.num_parameters() == parameters
    assert parameter_count(config) == parameters
    assert config.head_size == head_size
    assert 2 * model.gpt_neox.rotary_emb.inv_freq.shape[0] == rotated
    if flops is not None:
        # Upstream counts 4.5 operations per weight of the head, where there are 6; its figures have three digits.
        upstream = flops_per_token(config, 2048) - 1.5 * config.vocab_size * config.hidden_size
        assert upstream == pytest.approx(flops, rel=2e-3)


@pytest.mark.parametrize(
    "fields", [{"attention_bias": False}, {"tie_word_embeddings": True}, {"intermediate_size": 100}]
)
def test_count_of_other_shapes(fields, make_config):
    config = make_config(**fields)
    assert parameter_count(config) == on_meta(config).num_parameters()


def test_flops_of_a_tied_head_are_the_same(make_config):
    tied, untied = make_config(tie_word_embeddings=True), make_config(tie_word_embeddings=False)
    # 6 x (2 layers x (4 x 32 x 32 + 2 x 32 x 64) + 64 x 32) + 12 x 2 x 32 x 16
    assert flops_per_token(tied, 16) == flops_per_token(untied, 16) == 6 * (2 * 8192 + 2048) + 12288


def test_initial_methods_follow_the_erratum():
    for name in PRESETS:
        config = preset_config(name)
        wanted = ("normal", "scaled_normal") if name in ("pythia-6.9b", "pythia-12b") else ("small_init", "wang_init")
        assert (config.init_method, config.output_layer_init_method) == wanted


def test_fields_can_be_replaced():
    config = preset_config("pythia-70m", num_hidden_layers=2, rotary_pct=1.0)
    assert config.num_hidden_layers == 2
    assert config.rotary_pct == 1.0
    assert preset_config("pythia-70m").num_hidden_layers == 6


def test_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match=r"model 'pythia-70M' is unknown. Did you mean 'pythia-70m'\?"):
        preset_config("pythia-70M")
    with pytest.raises(RecipeError, match=r"model 'llama' is unknown. Choose one of pythia-14m"):
        preset_config("llama")
