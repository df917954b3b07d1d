"""GELU behind a column linear's product, and its gradient behind a row linear's: as in one process."""

import pytest
import torch

from neox_hf.kernels.weight_gradient import SumInGrad, sum_in
from neox_hf.modeling.recompute import recompute_selectively
from neox_hf.parallel import BehindGelu, ColumnParallelLinear
from tests.gloo import run_ranks
from tests.modeling.tensor_ranks import Layout, batch, joined, train_pass

WAYS = ["autograd sums", "products sum", "made again", "all computed again"]
FORMS = {"gelu": WAYS, "gelu_fast": ["products sum"]}
HOW_OFTEN = {"all computed again": 2}


def layout(**fields):
    return Layout(2, fields={"kernels": "triton", "hidden_dropout": 0.0, "attention_dropout": 0.0} | fields)


def prepared(model, way):
    if way != "autograd sums":
        for parameter in model.parameters():
            sum_in(parameter, SumInGrad())
    if way == "made again":
        recompute_selectively(model)
        assert not model.is_gradient_checkpointing
    if way == "all computed again":
        model.gradient_checkpointing_enable()
    return model.train()


def passes(rank, hidden_act):
    """A pass of each way, and how often GELU was behind a product in it."""
    found, method = [], ColumnParallelLinear.product_and_gelu
    for way in FORMS[hidden_act]:
        count = []
        ColumnParallelLinear.product_and_gelu = lambda *given, count=count: count.append(1) or method(*given)
        model = prepared(layout(hidden_act=hidden_act).of_rank(rank), way)
        found.append((train_pass(model, batch(1, 8)), len(count)))
    ColumnParallelLinear.product_and_gelu = method
    return found


@pytest.mark.parametrize("hidden_act", FORMS)
def test_equals_one_process(hidden_act):
    ranks = run_ranks(passes, 2, hidden_act)
    whole = layout(hidden_act=hidden_act, kernels="torch").whole()
    wanted = train_pass(whole, batch(1, 8))
    layers = whole.config.num_hidden_layers
    for place, way in enumerate(FORMS[hidden_act]):
        seen = [rank[place][0] for rank in ranks]
        assert [rank[place][1] for rank in ranks] == [layers * HOW_OFTEN.get(way, 1)] * 2
        for one in seen:
            torch.testing.assert_close(one.loss, wanted.loss, rtol=1e-5, atol=0)
        for name, value in wanted.gradients.items():
            torch.testing.assert_close(joined(seen, name), value, rtol=1e-4, atol=1e-6)


def where_it_is_left(rank):
    """Whether GELU is a node of its own in models for which it should be."""
    found = {}
    for name, fields in {
        "torch": {"kernels": "torch"},
        "relu": {"hidden_act": "relu"},
        "autocast": {},
        "hook": {},
        "no gradient": {},
    }.items():
        model = layout(**fields).of_rank(rank).train()
        mlp, seen = model.gpt_neox.layers[0].mlp, []
        leaving = mlp.leaving
        mlp.leaving = lambda x, leaving=leaving, seen=seen: seen.append(leaving(x)) or seen[-1]
        if name == "hook":
            mlp.act.register_forward_hook(lambda *_: None)
        with torch.set_grad_enabled(name != "no gradient"), torch.autocast("cpu", torch.bfloat16, name == "autocast"):
            model(**batch(1, 8), use_cache=False)
        found[name] = [isinstance(x, BehindGelu) for x in seen]
    return found


def test_where_something_comes_between_it_is_left():
    assert (
        run_ranks(where_it_is_left, 2)
        == [{"torch": [False], "relu": [False], "autocast": [False], "hook": [False], "no gradient": [True]}] * 2
    )
