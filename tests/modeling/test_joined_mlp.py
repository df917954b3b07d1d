"""Where the feed-forward half and the sum that closes a block are one node: then, gradients are the same."""

import importlib

import pytest
import torch

from neox_hf.kernels.weight_gradient import SumInGrad, sum_in
from neox_hf.modeling.mlp import GPTNeoXMLP
from neox_hf.modeling.recompute import recompute_kwargs

linear_gelu_module = importlib.import_module("neox_hf.kernels.linear_gelu")  # its function has the same name


@pytest.fixture
def joined(monkeypatch):
    """How often a block of this test has ended in one node."""
    calls, method = [], GPTNeoXMLP.joined
    monkeypatch.setattr(GPTNeoXMLP, "joined", lambda self, *inputs: calls.append(self) or method(self, *inputs))
    return calls


def summing(model):
    for parameter in model.parameters():
        sum_in(parameter, SumInGrad())
    return model.train()


def loss_and_gradients(model, ids):
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize(
    ("hidden_act", "full", "summed"),
    [("gelu", False, True), ("gelu", True, True), ("gelu", False, False), ("gelu_fast", False, True)],
)
def test_it_computes_the_same(hidden_act, full, summed, make_model, tokens, joined):
    fields = {"kernels": "triton", "hidden_dropout": 0.0, "hidden_act": hidden_act}
    model, apart = make_model(**fields).train(), make_model(**fields).train()
    for layer in apart.gpt_neox.layers:
        layer.mlp.joins = lambda *_: False
    if summed:
        summing(model)
    if full:
        model.gradient_checkpointing_enable()
    found = loss_and_gradients(model, tokens(length=4))
    assert len(joined) == model.config.num_hidden_layers * (2 if full else 1)
    for ours, theirs in zip(found, loss_and_gradients(apart, tokens(length=4)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert len(joined) == model.config.num_hidden_layers * (2 if full else 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"kernels": "torch"},
        {"hidden_dropout": 0.1},
        {"use_parallel_residual": False},
        {"attention_bias": False},
        {"hidden_act": "relu"},
    ],
    ids=str,
)
def test_where_something_comes_between_it_is_left(fields, make_model, tokens, joined):
    model = summing(make_model(**({"kernels": "triton", "hidden_dropout": 0.0} | fields)))
    loss_and_gradients(model, tokens(length=4))
    assert joined == []


@pytest.mark.parametrize("name", ["", "act", "dense_h_to_4h", "dense_4h_to_h"])
def test_where_a_hook_watches_it_is_left(name, make_model, tokens, joined):
    model = summing(make_model(kernels="triton", hidden_dropout=0.0))
    seen = []
    watched = model.gpt_neox.layers[0].mlp.get_submodule(name)
    watched.register_forward_hook(lambda *_: seen.append(name))
    loss_and_gradients(model, tokens(length=4))
    assert seen == [name]
    assert len(joined) == model.config.num_hidden_layers - 1


def test_without_gradients_it_is_left(make_model, tokens, joined):
    model = summing(make_model(kernels="triton", hidden_dropout=0.0))
    with torch.no_grad():
        model(tokens(length=4), use_cache=False)
    assert joined == []


def test_where_torch_keeps_products_it_is_left(make_model, tokens, joined, monkeypatch):
    """Selective checkpointing would keep what is behind the products as well, or compute them again."""
    seen = []
    monkeypatch.setattr(linear_gelu_module, "gelu_product", lambda *_: seen.append("gelu_product"))
    model = summing(make_model(kernels="triton", hidden_dropout=0.0))
    model.activation_checkpointing_enable(recompute_kwargs("selective"))
    loss_and_gradients(model, tokens(length=4))
    assert joined == seen == []
