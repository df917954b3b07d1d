"""Having a model's blocks train in eight bits: which linears, which not, and what stays as it is."""

import logging

import pytest
import torch
from torch.nn import functional as F

from neox_hf import apply_kernels
from neox_hf.errors import RecipeError
from neox_hf.modeling import mlp as mlp_module
from neox_hf.modeling.fp8_layers import compute_in_fp8, refresh_fp8_weights
from neox_hf.modeling.recompute import recompute_kwargs, recompute_selectively
from neox_hf.parallel import Linear
from neox_hf.parallel.data_parallel import accumulate_gradients_in_fp32

TOKENS = torch.arange(60).view(2, 30) % 64


def loss_of(model) -> torch.Tensor:
    return model(TOKENS, labels=TOKENS).loss


def gradients_of(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def error(found, truth) -> float:
    return ((found - truth).norm() / truth.norm()).item()


def test_the_linears_of_the_blocks_and_nothing_else(make_model, caplog):
    model = make_model().train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with caplog.at_level(logging.INFO):
        table = compute_in_fp8(model)
    linears = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    names = [f"gpt_neox.layers.{layer}.{linear}" for layer in range(2) for linear in linears]
    assert list(table.slots) == [f"{name}.{part}" for name in names for part in ("input", "weight", "gradient")]
    assert "fp8: 8 linears train in eight bits, by torch's arithmetic, which is slow" in caplog.text
    loss_of(model).backward()
    assert (table.amax > 0).sum() >= 20  # both halves of a block share the cast of their gradient
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_it_is_near_what_it_was(make_model):
    model = make_model().train()
    truth, expected = loss_of(model).item(), gradients_of(model)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    table = compute_in_fp8(model)
    for _ in range(2):
        found = gradients_of(model)
        table.advance()
        refresh_fp8_weights(model)
    assert loss_of(model).item() == pytest.approx(truth, rel=5e-3)
    assert loss_of(model).item() != truth
    assert max(error(found[name], expected[name]) for name in found) < 0.25


def test_what_is_evaluated_are_the_weights(make_model):
    model = make_model().eval()
    truth = model(TOKENS).logits
    table = compute_in_fp8(model)
    assert torch.equal(model(TOKENS).logits, truth)
    assert not table.amax.any()
    assert not torch.equal(model.train()(TOKENS).logits, truth)


def test_the_feed_forward_layer_is_one_op_only_where_nothing_would_notice(make_model, monkeypatch):
    model = make_model().train()
    compute_in_fp8(model)
    calls = []
    fused = mlp_module.fp8_mlp
    monkeypatch.setattr(mlp_module, "fp8_mlp", lambda *given: calls.append(1) or fused(*given))
    together = loss_of(model).item()
    assert len(calls) == 2
    heard = []
    model.gpt_neox.layers[1].mlp.act.register_forward_hook(lambda *given: heard.append(1))
    assert loss_of(model).item() == pytest.approx(together, rel=1e-3)
    assert (len(calls), len(heard)) == (3, 1)


def test_other_activations_have_two_linears(make_model):
    model = make_model(hidden_act="relu").train()
    truth = loss_of(model).item()
    table = compute_in_fp8(model)
    loss_of(model).backward()
    assert loss_of(model).item() == pytest.approx(truth, rel=5e-3)
    assert table.slots["gpt_neox.layers.0.mlp.dense_4h_to_h.gradient"].amax > 0


def test_linears_that_do_not_fit_stay_and_are_named_once(make_model, caplog):
    model = make_model(intermediate_size=40).train()
    compute_in_fp8(model)
    assert model.gpt_neox.layers[0].mlp.dense_h_to_4h.fp8 is None
    assert model.gpt_neox.layers[0].attention.dense.trains_in_fp8
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "fp8: these stay in half precision: gpt_neox.layers.*.mlp.dense_h_to_4h (its weight is [40, 32], and eight-bit "
        "products want multiples of 16); gpt_neox.layers.*.mlp.dense_4h_to_h (its weight is [32, 40], and eight-bit "
        "products want multiples of 16)"
    ]
    loss_of(model).backward()


def test_a_model_in_which_nothing_fits(make_model):
    with pytest.raises(RecipeError, match=r"computed in fp8: .*dense \(its weight is \[40, 40\].*; use bf16"):
        compute_in_fp8(make_model(hidden_size=40, intermediate_size=40))


def test_a_stock_model_needs_our_block(make_stock):
    model = make_stock()
    with pytest.raises(RecipeError, match="a GPTNeoXForCausalLM without linears of neox_hf's block; use bf16"):
        compute_in_fp8(model)
    apply_kernels(model)
    assert len(compute_in_fp8(model).slots) == 24


def test_a_device_without_eight_bits(make_model, monkeypatch):
    monkeypatch.setattr("neox_hf.modeling.fp8_layers.reason_against_device", lambda device: "it is old")
    model = make_model()
    with pytest.raises(RecipeError, match="fp8 cannot be computed here: it is old; use bf16"):
        compute_in_fp8(model)
    assert all(module.fp8 is None for module in model.modules() if isinstance(module, Linear))


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_what_is_computed_again_is_the_same(make_model, mode):
    model = make_model().train()
    table = compute_in_fp8(model)
    gradients_of(model)
    table.advance()
    refresh_fp8_weights(model)
    kept = {name: gradient.clone() for name, gradient in gradients_of(model).items()}
    if mode == "selective":
        recompute_selectively(model)
    else:
        model.activation_checkpointing_enable(recompute_kwargs(mode))
    again = gradients_of(model)
    assert [name for name in kept if not torch.equal(kept[name], again[name])] == []


def test_weights_are_made_when_told_in_memory_that_stays(make_model):
    model = make_model().train()
    table = compute_in_fp8(model)
    linear = model.gpt_neox.layers[0].attention.dense
    refresh_fp8_weights(model)
    made = linear.fp8.weight.of(linear.weight)
    gradients_of(model)
    assert linear.fp8.weight.of(linear.weight) is made
    table.advance()
    refresh_fp8_weights(model)
    again = linear.fp8.weight.of(linear.weight)
    assert again.rows is made.rows
    assert again.inverse.data_ptr() == table.slots["gpt_neox.layers.0.attention.dense.weight"].inverse.data_ptr()


def test_kernels_compute_what_the_references_do(make_model):
    """In place where they rotate, one gradient for both branches, and summed where the weights say."""
    found = []
    for kernels in ("torch", "triton"):
        model = make_model(kernels=kernels, num_hidden_layers=1).train()
        accumulate_gradients_in_fp32(model)
        table = compute_in_fp8(model)
        for _ in range(2):
            gradients = gradients_of(model)
            table.advance()
            refresh_fp8_weights(model)
        found.append(gradients)
    assert max(error(found[1][name], truth) for name, truth in found[0].items()) < 1e-3


def test_the_choice_of_kernels_holds(make_model):
    model = make_model(kernels="triton").train()
    compute_in_fp8(model)
    linear = model.gpt_neox.layers[0].attention.dense
    assert linear.fp8.backend == linear.fp8.weight.backend == "triton"
    x = torch.randn(3, 32)
    assert error(linear(x), F.linear(x, linear.weight, linear.bias)) < 0.06
