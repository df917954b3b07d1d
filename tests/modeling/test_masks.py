"""When a mask is built, and what documents it separates."""

from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from neox_hf.modeling.masks import causal_mask, flash_documents

LENGTH = 8


def filled_cache(model, tokens):
    return model(tokens(length=LENGTH), use_cache=True).past_key_values


def mask_of(config, attention_mask=None, position_ids=None, cache=None, length=LENGTH):
    return causal_mask(config, torch.zeros(2, length, config.hidden_size), attention_mask, position_ids, cache, "auto")


def test_no_mask_where_is_causal_says_it(make_model, tokens):
    model = make_model()
    config = model.config
    assert mask_of(config) is None
    assert mask_of(config, cache=DynamicCache(config=config)) is None
    assert mask_of(config, cache=filled_cache(model, tokens), length=1) is None
    assert mask_of(config, attention_mask=torch.ones(2, LENGTH)) is None
    assert mask_of(config, position_ids=torch.arange(LENGTH)[None]) is None


def test_a_mask_where_it_does_not(make_model, tokens):
    model = make_model()
    config = model.config
    padded = torch.ones(2, LENGTH)
    padded[0, 0] = 0
    assert mask_of(config, attention_mask=padded).shape == (2, 1, LENGTH, LENGTH)
    assert mask_of(config, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])).shape == (2, 1, LENGTH, LENGTH)
    assert mask_of(config, cache=filled_cache(model, tokens), length=2).shape == (2, 1, 2, LENGTH + 2)
    static = StaticCache(config=config, max_cache_len=16)
    assert mask_of(config, cache=static, length=1).shape == (2, 1, 1, 16)


def test_bidirectional_attention_is_not_taken_for_causal(make_model, tokens):
    model = make_model()
    ids = tokens()
    changed = ids.clone()
    changed[:, -1] += 1
    causal = [model(x, use_cache=False).logits[:, 0] for x in (ids, changed)]
    both = [model(x, use_cache=False, is_causal=False).logits[:, 0] for x in (ids, changed)]
    assert torch.equal(*causal)
    assert not torch.allclose(*both)


@pytest.mark.parametrize("told", ["the pass", "the configuration", "a pass with a mask of ones"])
def test_eager_attention_is_not_taken_for_causal_either(told, make_model, tokens):
    model = make_model(attention="eager")
    given = {"use_cache": False}
    if told == "the configuration":
        model.config.is_causal = False
    else:
        given["is_causal"] = False
    ids = tokens()
    if "ones" in told:
        given["attention_mask"] = torch.ones_like(ids)
    changed = ids.clone()
    changed[:, -1] += 1
    assert not torch.allclose(*[model(x, **given).logits[:, 0] for x in (ids, changed)])


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("training", [True, False])
def test_packed_documents_do_not_see_each_other(attention, training, make_model, tokens, uncompiled):
    """Also with the cache that a forward pass makes by default."""
    model = make_model(attention=attention).train(training)
    ids = tokens()
    positions = torch.tensor([[*range(5), *range(11)], [*range(9), *range(7)]])
    with torch.no_grad():
        packed = model(ids, position_ids=positions).logits
        for row, cut in enumerate((5, 9)):
            for part in (slice(0, cut), slice(cut, 16)):
                alone = model(ids[row : row + 1, part]).logits
                assert torch.allclose(packed[row : row + 1, part], alone, atol=1e-5)


def documents_of(config, attention_mask=None, position_ids=None, cache=None, rows=2):
    return flash_documents(config, torch.zeros(rows, 5, 32), attention_mask, position_ids, cache)


def test_flash_attention_is_told_the_documents_of_every_row(make_config):
    config = make_config()
    config._attn_implementation_internal = "sdpa"
    positions = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 0, 1, 2]])
    assert documents_of(config, position_ids=positions) == {}  # sdpa gets a mask
    config._attn_implementation_internal = "flash_attention_2"
    told = documents_of(config, position_ids=positions)
    assert told["cu_seq_lens_q"].tolist() == told["cu_seq_lens_k"].tolist() == [0, 3, 5, 7, 10]
    assert told["cu_seq_lens_q"].dtype == torch.int32
    assert told["max_length_q"] == told["max_length_k"] == 3
    assert documents_of(config, position_ids=positions[:1])["cu_seq_lens_q"].tolist() == [0, 3, 5, 8, 10]
    assert documents_of(config, position_ids=torch.arange(5)[None]) == {}
    assert documents_of(config, position_ids=positions, attention_mask=torch.ones(2, 5)) == {}
    assert documents_of(config, position_ids=positions, cache=DynamicCache(config=config)) == {}
    assert documents_of(config, position_ids=positions[:1], rows=1) == {}  # transformers finds these
    assert documents_of(config) == {}


def attend_by_bounds(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, **_):
    """What flash attention's variable-length form computes, one document after the other."""
    rows, heads, length, size = query.shape
    flat = [x.transpose(1, 2).reshape(rows * length, heads, size).transpose(0, 1) for x in (query, key, value)]
    documents = [
        torch.nn.functional.scaled_dot_product_attention(*(x[:, a:b] for x in flat), scale=scaling, is_causal=True)
        for a, b in pairwise(cu_seq_lens_q)
    ]
    return torch.cat(documents, dim=1).transpose(0, 1).reshape(rows, length, heads, size), None


def test_documents_reach_flash_attention(make_model, tokens, monkeypatch):
    model = make_model()
    positions = torch.tensor([[*range(5), *range(11)], [*range(9), *range(7)]])
    wanted = model(tokens(), position_ids=positions).logits
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", attend_by_bounds)
    model.config._attn_implementation_internal = "flash_attention_2"
    assert torch.allclose(model(tokens(), position_ids=positions).logits, wanted, atol=1e-5)
