"""What users do to models of transformers: ours, and those that `apply_kernels` has changed, follow."""

import pytest
import torch
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING

from neox_hf import apply_kernels
from neox_hf.kernels.weight_gradient import ATTRIBUTE
from neox_hf.modeling.recompute import makes_outputs_again
from tests.modeling.stock_steps import assert_same_step


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("skip_logits", [True, False])
@pytest.mark.parametrize(
    "labels",
    [torch.zeros(1, 8).long(), torch.zeros(2, 9).long(), torch.zeros(2, 8), None],
    ids=["too few", "too many", "no whole numbers", "shifted ones too few"],
)
def test_labels_that_are_not_one_for_each_token(labels, skip_logits, kernels, make_pair, tokens):
    _, model = make_pair(kernels=kernels, num_hidden_layers=1)
    given = {"shift_labels": torch.zeros(2, 7).long()} if labels is None else {"labels": labels}
    count = "16" if skip_logits else "2, 8"
    told = rf"labels are torch\.\w+ \[.*\], for tokens \[{count}\]; give one whole number for each"
    with pytest.raises(ValueError, match=told):
        model(tokens(length=8), skip_logits=skip_logits, **given)


@pytest.mark.parametrize("skip_logits", [True, False])
def test_another_label_for_nothing(skip_logits, make_pair, tokens):
    stock, model = make_pair()
    ids = tokens(length=8)
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, 0)
    wanted, found = (
        each(ids, labels=labels, ignore_index=0, use_cache=False, **more).loss
        for each, more in ((stock, {}), (model, {"skip_logits": skip_logits}))
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("applied", [True, False])
def test_no_logits_under_a_compiler_either(applied, make_pair, make_model, tokens):
    torch._dynamo.reset()
    model = make_pair(num_hidden_layers=1)[1] if applied else make_model(num_hidden_layers=1)
    ids = tokens(length=8)
    given = {"labels": ids, "skip_logits": True, "use_cache": False}
    wanted = model(ids, **given)
    found = torch.compile(model, fullgraph=True, backend="eager")(ids, **given)
    assert wanted.logits is found.logits is None
    torch.testing.assert_close(found.loss, wanted.loss)


def test_selective_recomputation_asks_the_linears(make_pair):
    """The configuration of transformers' knows no kernels."""
    for kernels in ("triton", "torch"):
        model = make_pair(kernels=kernels, num_hidden_layers=1)[1]
        for parameter in model.parameters():
            setattr(parameter, ATTRIBUTE, object())
        assert makes_outputs_again(model) is (kernels == "triton")


def test_both_branches_leave_their_biases(make_pair, tokens, monkeypatch):
    _, model = make_pair(kernels="triton", num_hidden_layers=1)
    layer, left = model.gpt_neox.layers[0], []
    asked = type(layer)._biases_left
    monkeypatch.setattr(type(layer), "_biases_left", lambda *given: left.append(asked(*given)) or left[-1])
    model(tokens(length=8), use_cache=False)
    assert [len(biases) for biases in left] == [2]


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize(
    "name",
    [
        "gpt_neox.embed_in",
        "gpt_neox.layers.0.input_layernorm",
        "gpt_neox.layers.0.attention.query_key_value",
        "gpt_neox.layers.0.mlp.dense_h_to_4h",
        "gpt_neox.layers.0.mlp.act",
        "embed_out",
    ],
)
def test_a_forward_pass_put_on_one_module_is_called(name, kernels, make_pair, tokens):
    pair = make_pair(kernels=kernels, num_hidden_layers=1)
    for model in pair:
        part = model.get_output_embeddings() if name == "embed_out" else model.get_submodule(name)
        part.forward = lambda x, before=part.forward: 2 * before(x)
    ids = tokens(length=8)
    wanted, found = (
        model(ids, labels=ids, use_cache=False, **more).loss
        for model, more in zip(pair, ({}, {"skip_logits": True}), strict=True)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["by name", "in the table"])
def test_a_loss_that_was_chosen_stays(how, make_stock, tokens, monkeypatch):
    stock, model = make_stock(), make_stock()
    if how == "by name":
        stock.loss_type = model.loss_type = "ForMaskedLM"
    else:
        monkeypatch.setitem(LOSS_MAPPING, "ForCausalLM", lambda logits, *_, **__: logits.sum())
    apply_kernels(model, "torch")
    ids = tokens(length=8)
    given = {"labels": ids, "use_cache": False}
    torch.testing.assert_close(model(ids, **given, skip_logits=True).loss, stock(ids, **given).loss)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_heads_that_are_not_rotated(kernels, make_pair, tokens):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.0}
    ids = tokens(length=8)
    pair = make_pair(kernels=kernels, num_hidden_layers=1, rope_parameters=rope)
    assert_same_step(*pair, input_ids=ids, labels=ids, use_cache=False)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_norm_without_parameters_stays_torchs(kernels, make_stock, tokens):
    stock, model = make_stock(num_hidden_layers=1), make_stock(num_hidden_layers=1)
    for each in (stock, model):
        each.gpt_neox.final_layer_norm = nn.LayerNorm(32, elementwise_affine=False)
    apply_kernels(model, kernels)
    ids = tokens(length=8)
    assert_same_step(stock, model, input_ids=ids, labels=ids, use_cache=False)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_head_whose_columns_lie_together(kernels, make_pair, tokens):
    stock, model = make_pair(kernels=kernels, num_hidden_layers=1)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().t().contiguous().t())
    ids = tokens(length=8)
    losses = [
        stock(ids, labels=ids, use_cache=False).loss,
        model(ids, labels=ids, use_cache=False, skip_logits=True).loss,
    ]
    for loss in losses:
        (2 * loss).backward()
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(head.weight.grad, stock.get_output_embeddings().weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_loss_without_logits_says_that_it_has_no_second_derivative(kernels, make_pair, tokens):
    _, model = make_pair(kernels=kernels, num_hidden_layers=1)
    ids, weight = tokens(length=8), model.gpt_neox.final_layer_norm.weight
    loss = model(ids, labels=ids, use_cache=False, skip_logits=True).loss
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.norm().backward()


def test_a_block_called_by_itself(make_pair, tokens):
    """With its arguments in the order of transformers'."""
    angles = torch.randn(2, 1, 8, 4).cos()
    states = torch.randn(2, 8, 32)
    positions = torch.arange(8)[None]
    wanted, found = (
        model.gpt_neox.layers[0](states, None, positions, False, None, tuple(halves(angles, model)))
        for model in make_pair()
    )
    torch.testing.assert_close(found, wanted)


def halves(angles, model):
    """Angles as this model's blocks take them: transformers has each twice, one for either half of a pair."""
    twice = type(model).__module__.startswith("transformers")
    return (torch.cat((each, each), dim=-1) if twice else each for each in angles)
