"""Layers as CUDA graphs: the same numbers to the last bit, and only where graphs may stand in for the layers."""

import copy
from functools import partial

import pytest
import torch

from neox_hf.kernels.weight_gradient import SumInGrad, sum_in
from neox_hf.modeling import layer_graphs
from neox_hf.modeling.layer_graphs import MOST_SHAPES, PATIENCE, LayerGraphs
from neox_hf.modeling.recompute import recompute_selectively
from tests.modeling.replayed_passes import ComputedPass

STEPS = 4
PASSES = 2


def summing(model):
    for parameter in model.parameters():
        sum_in(parameter, SumInGrad())
    return model.train()


@pytest.fixture
def hidden():
    return torch.randn(2, 8, 32, requires_grad=True)


@pytest.fixture
def model(make_model):
    return summing(make_model(hidden_dropout=0.0))


@pytest.fixture
def graphs(model):
    graphs = LayerGraphs(model.gpt_neox.layers)
    graphs._seen[torch.Size([2, 8, 32]), torch.float32] = PATIENCE
    return graphs


def test_a_shape_is_taken_when_it_has_come_often_enough(model, hidden):
    graphs = LayerGraphs(model.gpt_neox.layers)
    assert [graphs.take(graphs.layers, hidden) for _ in range(PATIENCE + 2)] == [False] * PATIENCE + [True] * 2
    assert not graphs.take(graphs.layers, torch.randn(3, 8, 32, requires_grad=True))


def test_what_graphs_may_not_stand_in_for_is_not_taken(model, graphs, hidden):
    layers = graphs.layers
    assert graphs.take(layers, hidden)
    assert not graphs.take([], hidden)
    assert not graphs.take(layers, hidden.detach())
    with torch.no_grad():
        assert not graphs.take(layers, hidden)
    with torch.autocast("cpu", torch.bfloat16):
        assert not graphs.take(layers, hidden)
    model.gradient_checkpointing_enable()
    assert not graphs.take(layers, hidden)
    model.gradient_checkpointing_disable()
    model.eval()
    assert not graphs.take(layers, hidden)
    model.train()
    assert graphs.take(layers, hidden)
    layers[1].mlp.register_forward_hook(lambda *_: None)
    assert not graphs.take(layers, hidden)


@pytest.mark.parametrize("attach", ["register_forward_pre_hook", "register_full_backward_pre_hook"])
def test_a_module_that_is_watched_is_called(graphs, hidden, attach):
    handle = getattr(graphs.layers[0].attention, attach)(lambda *_: None)
    assert not graphs.take(graphs.layers, hidden)
    handle.remove()
    assert graphs.take(graphs.layers, hidden)


def test_a_gradient_that_is_watched_is_autograd_s(graphs, hidden):
    handle = graphs.layers[1].mlp.dense_h_to_4h.weight.register_hook(lambda gradient: gradient)
    assert not graphs.take(graphs.layers, hidden)
    handle.remove()
    assert graphs.take(graphs.layers, hidden)


def test_graphs_wait_until_what_they_read_is_settled(model, hidden):
    settled = []
    graphs = LayerGraphs(model.gpt_neox.layers, lambda _: bool(settled))
    assert not any(graphs.take(graphs.layers, hidden) for _ in range(PATIENCE + 2))
    settled.append(True)
    assert graphs.take(graphs.layers, hidden)


def test_so_many_shapes_have_graphs_and_no_more(graphs, hidden):
    graphs._idle.update({(torch.Size([length]), torch.float32): [] for length in range(MOST_SHAPES)})
    assert not graphs.take(graphs.layers, hidden)
    graphs._idle.popitem()
    graphs._idle[hidden.shape, hidden.dtype] = []
    assert graphs.take(graphs.layers, hidden)


def test_a_copy_of_the_model_has_no_graphs(model, graphs):
    model.gpt_neox.graphs = graphs
    assert copy.deepcopy(model).gpt_neox.graphs is None


@pytest.mark.parametrize("given", [{"use_cache": True}, {"attention_mask": True}, {"output_hidden_states": True}])
def test_a_pass_with_more_than_tokens_runs_as_it_is(model, graphs, tokens, given):
    """A graph would need CUDA: this one runs on a CPU."""
    model.gpt_neox.graphs = graphs
    ids = tokens(length=8)
    if "attention_mask" in given:
        given = {"attention_mask": torch.ones_like(ids)}
    model(ids, labels=ids, **given).loss.backward()


def test_sums_are_taken_up_where_they_were(model):
    weight = next(model.parameters())
    total = SumInGrad().total(weight)
    assert weight.grad is total
    assert not total.any()
    weight.grad = None
    assert SumInGrad().resume(weight, total)
    assert weight.grad is total
    assert not SumInGrad().resume(weight, total)
    weight.grad = torch.ones_like(weight)
    assert not SumInGrad().resume(weight, total)
    assert weight.grad is total
    assert bool((total == 1).all())


def test_who_waits_for_a_gradient_is_told_once_it_is_there(model, tokens, monkeypatch):
    layers = model.gpt_neox.layers
    monkeypatch.setattr(layer_graphs, "_CapturedPass", partial(ComputedPass, layers))
    model.gpt_neox.graphs = LayerGraphs(layers)
    told = []
    for module in (layers[0].mlp.dense_h_to_4h, layers[1].input_layernorm):
        module.weight.register_post_accumulate_grad_hook(lambda weight: told.append(weight.grad.clone()))
    ids = tokens(length=8)
    for _ in range(PATIENCE + 2):
        told.clear()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert len(told) == 2
        assert torch.equal(told[0], layers[1].input_layernorm.weight.grad)
        assert torch.equal(told[1], layers[0].mlp.dense_h_to_4h.weight.grad)
    assert model.gpt_neox.graphs._idle


def figures(model, ids, in_flight, graphs):
    """Losses and gradients of some steps, `in_flight` passes at once."""
    model = summing(copy.deepcopy(model).to("cuda", torch.bfloat16))
    if graphs:
        model.gpt_neox.graphs = LayerGraphs(model.gpt_neox.layers)
    found = []
    for step in range(STEPS):
        model.zero_grad()
        for _ in range(PASSES):
            batches = [ids.roll(step + shift, 1) for shift in range(in_flight)]
            losses = [model(batch, labels=batch, use_cache=False, skip_logits=True).loss for batch in batches]
            for loss in losses:
                loss.backward()
            found += [loss.detach() for loss in losses]
        found += [parameter.grad.clone() for parameter in model.parameters()]
    if graphs:
        assert sum(len(idle) for idle in model.gpt_neox.graphs._idle.values()) == in_flight
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_graphs_compute_what_the_layers_do(make_model, in_flight, selective, parallel):
    model = summing(make_model(hidden_size=128, hidden_dropout=0.0, use_parallel_residual=parallel)).cuda()
    if selective:
        recompute_selectively(model)
        assert model.gpt_neox.layers[0].mlp.act.makes_again
    ids = torch.randint(0, 64, (2, 32), device="cuda")
    plain, graphed = (figures(model, ids, in_flight, graphs) for graphs in (False, True))
    assert [index for index, (a, b) in enumerate(zip(plain, graphed, strict=True)) if not torch.equal(a, b)] == []
