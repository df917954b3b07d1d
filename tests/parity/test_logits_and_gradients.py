"""Logits, loss and the gradient of every parameter equal transformers', over the shapes GPT-NeoX has."""

import pytest
import torch
from transformers import GPTNeoXConfig as StockConfig
from transformers.models.gpt_neox import modeling_gpt_neox as stock

from neox_hf import GPTNeoXConfig, GPTNeoXForCausalLM

HEADS = {32: 2, 80: 2, 96: 2, 256: 1}  # head size -> number of heads
CASES = [
    {
        "head_size": size,
        "rotary_pct": rotary,
        "use_parallel_residual": parallel,
        "attention_bias": bias,
        "hidden_act": act,
    }
    # Each size meets each pair of the other options at least once over the four rows.
    for size in HEADS
    for rotary, parallel, bias, act in [
        (0.25, True, True, "gelu"),
        (1.0, True, False, "gelu_fast"),
        (0.25, False, False, "gelu_fast"),
        (1.0, False, True, "gelu"),
    ]
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_equal(case, make_pair, tokens, assert_same_step):
    case = dict(case)
    size = case.pop("head_size")
    pair = make_pair(hidden_size=size * HEADS[size], num_attention_heads=HEADS[size], **case)
    ids = tokens()
    assert_same_step(pair, input_ids=ids, labels=ids)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "batch",
    ["plain", "right padding", "left padding", "packed", "offset positions", "shift_labels", "num_items_in_batch"],
)
def test_equal_on_every_kind_of_batch(attention, batch, make_pair, tokens, assert_same_step):
    ids = tokens()
    extra = {"use_cache": False}
    if batch == "right padding":
        extra["attention_mask"] = torch.ones_like(ids)
        extra["attention_mask"][0, 15:] = 0
    elif batch == "left padding":
        extra["attention_mask"] = torch.ones_like(ids)
        extra["attention_mask"][1, :9] = 0
        extra["position_ids"] = (extra["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    elif batch == "packed":
        extra["position_ids"] = torch.cat((torch.arange(7), torch.arange(17))).repeat(2, 1)
    elif batch == "offset positions":
        extra["position_ids"] = torch.arange(5, 29)[None]
    elif batch == "shift_labels":
        extra["shift_labels"] = tokens(seed=1)
    elif batch == "num_items_in_batch":
        extra["num_items_in_batch"] = torch.tensor(100)
    assert_same_step(make_pair(attention), input_ids=ids, labels=ids, **extra)


@pytest.mark.parametrize(
    "fields",
    [
        {"tie_word_embeddings": True},
        {"hidden_act": "relu"},
        {"hidden_act": "gelu_new"},
        {"layer_norm_eps": 1e-2},
        {"rotary_emb_base": 500.0},
        {
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 4.0,
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "dynamic",
                "factor": 2.0,
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            }
        },
    ],
    ids=str,
)
def test_equal_under_other_options(fields, make_pair, tokens, assert_same_step):
    ids = tokens(length=80) if fields.get("rope_parameters", {}).get("rope_type") == "dynamic" else tokens()
    assert_same_step(make_pair(**fields), input_ids=ids, labels=ids)


@pytest.mark.parametrize("batch", ["plain", "packed"])
def test_equal_through_flex_attention(batch, make_pair, tokens):
    """Forward only: torch has no gradient of it on a CPU. Uncompiled: compiling it takes a CPU half a minute."""
    pair = make_pair("flex_attention")
    packed = {"position_ids": torch.cat((torch.arange(7), torch.arange(17))).repeat(2, 1)} if batch == "packed" else {}
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        wanted, found = (model(tokens(), use_cache=False, **packed).logits for model in (pair.stock, pair.ours))
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))


def test_equal_with_dropout_and_the_same_seed(make_pair, tokens, assert_same_step):
    pair = make_pair("eager", hidden_dropout=0.1, attention_dropout=0.1)
    pair.stock.train()
    pair.ours.train()
    ids = tokens()
    outputs = []
    for model in (pair.stock, pair.ours):
        torch.manual_seed(3)
        outputs.append(model(ids, labels=ids))
    assert torch.allclose(outputs[0].loss, outputs[1].loss, rtol=1e-5)
    assert torch.allclose(outputs[0].logits, outputs[1].logits, atol=1e-5)


def test_inputs_embeds_and_logits_to_keep(make_pair, tokens):
    pair = make_pair()
    ids = tokens()
    embeds = pair.stock.get_input_embeddings()(ids)
    for keep in (0, 1, 5, torch.tensor([2, 9])):
        wanted = pair.stock(inputs_embeds=embeds, logits_to_keep=keep).logits
        assert torch.allclose(pair.ours(inputs_embeds=embeds, logits_to_keep=keep).logits, wanted, atol=1e-5)


def test_hidden_states_and_attentions(make_pair, tokens):
    pair = make_pair("eager")
    ids = tokens()
    wanted, found = (model(ids, output_hidden_states=True, output_attentions=True) for model in (pair.stock, pair.ours))
    assert len(found.hidden_states) == 3
    assert len(found.attentions) == 2
    for a, b in zip(found.hidden_states + found.attentions, wanted.hidden_states + wanted.attentions, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_return_dict_false(make_pair, tokens):
    pair = make_pair()
    ids = tokens()
    wanted, found = (model(ids, labels=ids, use_cache=False, return_dict=False) for model in (pair.stock, pair.ours))
    assert isinstance(found, tuple)
    assert len(found) == len(wanted) == 2
    assert torch.allclose(found[1], wanted[1], atol=1e-5)


def test_bfloat16_is_no_further_from_the_truth(make_pair, tokens):
    errors = torch.tensor([bfloat16_errors(make_pair, tokens, seed) for seed in range(8)])
    theirs, ours = errors.mean(0)
    assert ours <= theirs * 1.01  # two roundings apart they scatter by about 1 % for each seed


def bfloat16_errors(make_pair, tokens, seed: int) -> list[float]:
    """Distance of stock's and of our bf16 logits from stock's in fp32."""
    ids = tokens(rows=4, length=64, seed=seed)
    dtypes = (torch.float32, torch.bfloat16)
    exact, low = (make_pair(num_hidden_layers=4, hidden_size=128, dtype=dtype) for dtype in dtypes)
    with torch.no_grad():
        truth = exact.stock(ids).logits
        return [float(((model(ids).logits.float() - truth) ** 2).mean().sqrt()) for model in (low.stock, low.ours)]


def test_same_seed_same_weights():
    fields = {
        "vocab_size": 32,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    torch.manual_seed(5)
    wanted = stock.GPTNeoXForCausalLM(StockConfig(**fields)).state_dict()
    torch.manual_seed(5)
    found = GPTNeoXForCausalLM(GPTNeoXConfig(**fields)).state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
