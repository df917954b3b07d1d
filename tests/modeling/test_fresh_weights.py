"""First weights are a function of seed and name: the same at every layout, and spread as each method says."""

import math

import pytest
import torch

from neox_hf import GPTNeoXForCausalLM, GPTNeoXForSequenceClassification
from neox_hf.modeling.fresh_weights import draw_weights
from neox_hf.modeling.initialization import INIT_METHODS
from neox_hf.parallel.topology import Topology

HIDDEN, LAYERS = 64, 3
COLUMN = ("query_key_value", "dense_h_to_4h")
ROW = ("attention.dense", "dense_4h_to_h")


def on_meta(config, *topology, model_class=GPTNeoXForCausalLM):
    with torch.device("meta"):
        return model_class(config, *topology)


def drawn(config, seed=1, device="cpu", **options):
    model = on_meta(config)
    draw_weights(model, seed, device, **options)
    return model


@pytest.fixture
def config(make_config):
    return make_config(
        vocab_size=100,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        init_method="small_init",
        output_layer_init_method="wang_init",
    )


def test_every_tensor_has_values_of_its_own_and_they_repeat(config):
    state = drawn(config).state_dict()
    again, other_seed = drawn(config).state_dict(), drawn(config, seed=2).state_dict()
    matrices = {name: value for name, value in state.items() if value.ndim == 2}
    assert len({value.flatten()[:8].numpy().tobytes() for value in matrices.values()}) == len(matrices)
    for name, value in state.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, other_seed[name]) == (value.ndim == 1), name


def test_values_do_not_depend_on_the_rest_of_the_model(config, make_config):
    taller = make_config(**(config.to_dict() | {"num_hidden_layers": LAYERS + 1, "output_layer_init_method": "normal"}))
    state, other = drawn(config).state_dict(), drawn(taller).state_dict()
    for name, value in state.items():
        if not name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
            assert torch.equal(value, other[name]), name


def test_default_generators_are_left_alone(config):
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    drawn(config)
    assert torch.equal(torch.rand(2), wanted)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("sequence", [False, True])
def test_shares_join_to_the_whole_and_padding_is_zero(config, size, sequence, tied):
    config.tie_word_embeddings = tied
    whole = drawn(config).state_dict()
    ranks = []
    for rank in range(size):
        model = on_meta(config, Topology(tensor=size, rank=rank, sequence=sequence))
        draw_weights(model, 1, "cpu")
        assert (model.lm_head.weight is model.gpt_neox.embed_in.weight) == tied
        ranks.append(model.state_dict())
    for name, value in whole.items():
        parts = [state[name] for state in ranks]
        if name.endswith(tuple(f"{role}.{kind}" for role in COLUMN for kind in ("weight", "bias"))):
            assert torch.equal(torch.cat(parts), value), name
        elif name.endswith(tuple(f"{role}.weight" for role in ROW)):
            assert torch.equal(torch.cat(parts, dim=1), value), name
        elif name.endswith(("embed_in.weight", "lm_head.weight")):
            joined = torch.cat(parts)
            assert torch.equal(joined[: len(value)], value)
            assert joined.shape[0] == 128 * size
            assert not joined[len(value) :].any()
        else:
            assert all(torch.equal(part, value) for part in parts), name


@pytest.mark.parametrize("tied", [False, True])
def test_a_pipeline_rank_draws_its_modules_only(config, tied):
    config.tie_word_embeddings = tied
    whole = drawn(config).state_dict()
    for pick in (
        lambda body, head: [body.embed_in, body.rotary_emb, body.layers[0]],
        lambda body, head: [body.rotary_emb, *body.layers[1:], body.final_layer_norm, head],
    ):
        model = on_meta(config)
        body, local = model.gpt_neox, pick(model.gpt_neox, model.lm_head)
        draw_weights(model, 1, "cpu", local=local)
        held = {name for name, value in model.state_dict().items() if not value.is_meta}
        wanted = {
            name
            for name, _ in model.named_parameters(remove_duplicate=False)
            if any(model.get_parameter(name) is p for module in local for p in module.parameters())
        }
        assert held == wanted
        assert 0 < len(held) < len(whole)
        assert all(torch.equal(model.state_dict()[name], whole[name]) for name in held)
        assert (model.lm_head.weight is body.embed_in.weight) == tied
        assert not body.rotary_emb.inv_freq.is_meta


def test_what_is_not_local_keeps_its_parameters(config):
    model = on_meta(config)
    elsewhere = model.gpt_neox.layers[1].mlp.dense_h_to_4h.weight
    draw_weights(model, 1, "cpu", local=[model.gpt_neox.layers[0]])
    assert model.gpt_neox.layers[1].mlp.dense_h_to_4h.weight is elsewhere
    assert model.gpt_neox.rotary_emb.inv_freq.is_meta


def test_parameters_with_memory_are_overwritten_in_place(config):
    with torch.device("cpu"):
        model = GPTNeoXForCausalLM(config)
    before = dict(model.named_parameters())
    draw_weights(model, 1, "cpu")
    wanted = drawn(config).state_dict()
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        assert torch.equal(parameter, wanted[name])


def test_marks_on_a_parameter_stay(config):
    model = on_meta(config)
    weight = model.gpt_neox.embed_in.weight
    weight.tensor_model_parallel = True
    weight.requires_grad_(False)
    draw_weights(model, 1, "cpu")
    assert model.gpt_neox.embed_in.weight.tensor_model_parallel
    assert not model.gpt_neox.embed_in.weight.requires_grad
    assert model.lm_head.weight.requires_grad


@pytest.mark.parametrize("fields", [{}, {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}])
def test_buffers_equal_those_of_a_model_built_with_memory(make_config, fields):
    config = make_config(**fields)
    ours, stock = drawn(config), GPTNeoXForCausalLM(config)
    for (name, found), (_, wanted) in zip(ours.named_buffers(), stock.named_buffers(), strict=True):
        assert torch.equal(found, wanted), name
    tokens = torch.arange(8)[None]
    ours.load_state_dict(stock.state_dict())
    assert torch.equal(ours(tokens).logits, stock(tokens).logits)


def test_half_precision_holds_the_rounded_values(config):
    model = on_meta(config).to(torch.bfloat16)
    draw_weights(model, 1, "cpu")
    for name, value in drawn(config).state_dict().items():
        assert model.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(model.state_dict()[name], value.bfloat16())


def test_other_heads(make_config):
    model = on_meta(make_config(num_labels=3), model_class=GPTNeoXForSequenceClassification)
    draw_weights(model, 1, "cpu")
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model(torch.ones(1, 4, dtype=torch.int64)).logits.isfinite().all()


STD = {
    "normal": 0.02,
    "scaled_normal": 0.02 / math.sqrt(2 * LAYERS),
    "single_residual_scaled_normal": 0.02 / math.sqrt(LAYERS),
    "small_init": math.sqrt(2 / (5 * HIDDEN)),
    "wang_init": 2 / LAYERS / math.sqrt(HIDDEN),
}


@pytest.mark.parametrize("method", INIT_METHODS)
def test_spread_of_each_method(make_config, method):
    fields = {"hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": 512}
    model = drawn(make_config(**fields, init_method=method, output_layer_init_method="normal"))
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            assert torch.equal(weight, torch.full_like(weight, float("norm" in name and name.endswith("weight"))))
            continue
        rows, columns = weight.shape
        if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
            wanted = 0.02
        elif method in STD:
            wanted = STD[method]
        elif "xavier" in method:
            wanted = math.sqrt(2 / (rows + columns))
        else:
            gain = math.sqrt(2 if method == "orthogonal" else 2 / LAYERS)
            wanted = gain / math.sqrt(max(rows, columns))
        assert weight.std().item() == pytest.approx(wanted, rel=0.04), name
        assert abs(weight.mean().item()) < 0.06 * wanted, name
