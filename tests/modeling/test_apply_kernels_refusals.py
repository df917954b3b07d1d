"""Models that `apply_kernels` leaves as they are: those of ours, and those that it refuses."""

import pytest
from torch import nn
from transformers import BertConfig, BertModel
from transformers.models.gpt_neox import modeling_gpt_neox as stock

from neox_hf import apply_kernels
from tests.modeling.stock_steps import assert_near, assert_same_step


def test_a_model_of_ours_only_gets_the_choice(make_model, tokens):
    model = make_model()
    kinds = [type(module) for module in model.modules()]
    wanted = model(tokens(), labels=tokens())
    assert apply_kernels(model, "triton") is model
    assert [type(module) for module in model.modules()] == kinds
    assert model.config.kernels == "triton"
    assert model.gpt_neox.layers[1].mlp.act.kernels == "triton"
    found = model(tokens(), labels=tokens())
    assert_near(found.loss, wanted.loss)


def test_twice_is_once(make_pair, tokens):
    before, after = make_pair()
    kinds = [type(module) for module in after.modules()]
    apply_kernels(after, "torch")
    assert [type(module) for module in after.modules()] == kinds
    assert_same_step(before, after, input_ids=tokens(), labels=tokens())


def test_refuses_other_models():
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    bert = BertModel(BertConfig(vocab_size=8, **tiny))
    message = r"wants a GPT-NeoX model; found transformers\..*\.BertModel, .*\. Load one with .* model_type gpt_neox"
    with pytest.raises(ValueError, match=message):
        apply_kernels(bert)


def test_refuses_an_unknown_choice(make_stock):
    with pytest.raises(ValueError, match="kernels='cuda' is unknown; choose one of auto, triton, torch"):
        apply_kernels(make_stock(), "cuda")


@pytest.mark.parametrize("part", ["", "layers.1", "layers.1.attention", "layers.1.mlp", "rotary_emb"])
def test_refuses_classes_of_the_users(part, make_stock):
    model = make_stock(stock.GPTNeoXModel)
    kinds = [type(module) for module in model.modules()]
    changed = model.get_submodule(part)
    theirs = type(changed)
    changed.__class__ = type("Mine", (theirs,), {})
    message = rf"knows transformers' own {theirs.__name__}; found .*\.Mine\. Apply the kernels first"
    with pytest.raises(ValueError, match=message):
        apply_kernels(model)
    changed.__class__ = theirs
    assert [type(module) for module in model.modules()] == kinds


def test_refuses_a_forward_of_the_users(make_stock):
    model = make_stock()
    attention = model.gpt_neox.layers[0].attention
    attention.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="found a GPTNeoXAttention whose `forward` was replaced"):
        apply_kernels(model)


@pytest.mark.parametrize(("parent", "name"), [("layers.0", "attention"), ("", "rotary_emb")])
def test_refuses_parts_of_another_kind(parent, name, make_stock):
    model = make_stock(stock.GPTNeoXModel)
    setattr(model.get_submodule(parent), name, nn.Identity())
    with pytest.raises(ValueError, match=rf"as `{name}` of a GPTNeoX\w+; found torch\..*\.Identity"):
        apply_kernels(model)


def test_fields_that_only_ours_have_mean_nothing(make_stock, tokens):
    """A stock model computes as its own class does, whatever else its configuration carries."""
    model = make_stock(init_method="truncated", norm="rmsnorm", kernels="fast")
    wanted = model(tokens()).logits
    assert_near(apply_kernels(model, "torch")(tokens()).logits, wanted)


def test_nothing_has_changed_where_the_configuration_is_wrong(make_stock):
    model = make_stock()
    model.config.hidden_act = "unheard of"
    with pytest.raises(ValueError, match="unheard of"):
        apply_kernels(model)
    assert type(model) is stock.GPTNeoXForCausalLM
    assert type(model.gpt_neox.layers[0]) is stock.GPTNeoXLayer
