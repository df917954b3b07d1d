"""Two models with the same weights: transformers' own, and ours."""

from dataclasses import dataclass

import pytest
import torch
from transformers import GPTNeoXConfig as StockConfig
from transformers.models.gpt_neox import modeling_gpt_neox as stock

from neox_hf import GPTNeoXConfig, GPTNeoXForCausalLM

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@dataclass
class Pair:
    stock: stock.GPTNeoXForCausalLM
    ours: GPTNeoXForCausalLM


@pytest.fixture
def make_pair():
    """Build both from the same fields. Every parameter is drawn at random, norms and biases too."""

    def make(attention="sdpa", dtype=torch.float32, **fields):
        fields = SMALL | fields
        theirs = stock.GPTNeoXForCausalLM._from_config(StockConfig(**fields), attn_implementation=attention)
        ours = GPTNeoXForCausalLM._from_config(GPTNeoXConfig(**fields), attn_implementation=attention)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + centre)
        ours.load_state_dict(theirs.state_dict())
        return Pair(theirs.to(dtype), ours.to(dtype))

    return make


@pytest.fixture
def tokens():
    """Random token ids int64 [rows, length], none of them the padding or end token 0."""

    def draw(rows=2, length=24, vocabulary=SMALL["vocab_size"], seed=0):
        return torch.randint(1, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture
def assert_same_step():
    """Losses and logits equal to 1e-5, gradients within 1e-5 of the largest element of each tensor."""

    def check(pair, **batch):
        theirs, ours = pair.stock(**batch), pair.ours(**batch)
        assert torch.allclose(
            ours.logits, theirs.logits, rtol=0, atol=1e-5 * max(1.0, float(theirs.logits.detach().abs().max()))
        )
        assert torch.allclose(ours.loss, theirs.loss, rtol=1e-5)
        theirs.loss.backward()
        ours.loss.backward()
        wanted = dict(pair.stock.named_parameters())
        assert wanted.keys() == dict(pair.ours.named_parameters()).keys()
        for name, parameter in pair.ours.named_parameters():
            scale = wanted[name].grad.abs().max()
            assert scale > 0, f"{name} has no gradient to compare"
            worst = (parameter.grad - wanted[name].grad).abs().max() / scale
            assert worst <= 1e-5, f"gradient of {name} is {worst:.1e} of its largest element away"

    return check
