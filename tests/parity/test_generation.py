"""`generate` gives transformers' tokens."""

import pytest
import torch

SETTINGS = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "static cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "no cache": {"do_sample": False, "use_cache": False},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_equal_tokens(setting, attention, make_pair, tokens):
    pair = make_pair(attention)
    rows = 1 if setting == "prompt lookup" else 2
    ids = tokens(rows=rows, length=9)
    mask = torch.ones_like(ids)
    if rows == 2:
        mask[1, :4] = 0  # left padding
    generated = []
    for model in (pair.stock, pair.ours):
        torch.manual_seed(0)
        generated.append(
            model.eval().generate(ids, attention_mask=mask, max_new_tokens=16, pad_token_id=0, **SETTINGS[setting])
        )
    assert torch.equal(*generated)
    assert generated[0].shape[1] > 12


def test_assisted_generation_equals_greedy(make_pair, tokens):
    model = make_pair().ours.eval()
    assistant = make_pair(num_hidden_layers=1).ours.eval()
    ids = tokens(rows=1, length=9)
    plain = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assisted = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, assistant_model=assistant)
    assert torch.equal(plain, assisted)


def test_left_padding_changes_nothing(make_pair, tokens):
    model = make_pair().ours.eval()
    ids = tokens(rows=1, length=9)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.int64), ids), dim=1)
    mask = (padded != 0).long()
    alone = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    beside = model.generate(padded, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(alone[:, 9:], beside[:, 14:])
