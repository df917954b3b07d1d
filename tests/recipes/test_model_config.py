"""What the `model:` section becomes: its gaps filled from the named size, the tokenizer and the samples."""

import pytest

from neox_hf.errors import RecipeError
from neox_hf.modeling.settings import ModelSettings, model_config, padded_vocab_size

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}


def test_gaps_are_filled_from_tokenizer_and_samples():
    config = model_config(ModelSettings(**SMALL), tokens=257, seq_length=48)
    assert (config.vocab_size, config.max_position_embeddings, config.intermediate_size) == (384, 48, 256)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 64, 4)


def test_every_field_reaches_the_configuration():
    fields = {
        **SMALL,
        "vocab_size": 300,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        "rotary_pct": 1,
        "rotary_emb_base": 500,
        "use_parallel_residual": False,
        "attention_bias": False,
        "hidden_act": "gelu_fast",
        "layer_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "hidden_dropout": 0.1,
        "attention_dropout": 0,
        "init_method": "small_init",
        "output_layer_init_method": "wang_init",
        "initializer_range": 0.01,
        "kernels": "torch",
    }
    config = model_config(ModelSettings(**fields), tokens=300, seq_length=32)
    assert {key: getattr(config, key) for key in fields} == fields
    eager = model_config(ModelSettings(**SMALL, attn_implementation="eager"), tokens=10, seq_length=32)
    assert eager._attn_implementation == "eager"


def test_a_named_size_keeps_what_is_unset():
    config = model_config(ModelSettings(name="pythia-160m", hidden_dropout=0.1), tokens=50254, seq_length=512)
    assert (config.vocab_size, config.hidden_size, config.max_position_embeddings) == (50304, 768, 2048)
    assert config.hidden_dropout == 0.1


def test_a_tokenizer_that_is_too_large():
    with pytest.raises(RecipeError) as error:
        model_config(ModelSettings(**SMALL, vocab_size=256), tokens=257, seq_length=32)
    assert str(error.value) == (
        "model.vocab_size = 256: the tokenizer has 257 tokens; "
        "set model.vocab_size to at least 384 or use a smaller tokenizer"
    )


@pytest.mark.parametrize(("tokens", "rows"), [(1, 128), (128, 128), (129, 256), (50254, 50304)])
def test_padding(tokens, rows):
    assert padded_vocab_size(tokens) == rows
