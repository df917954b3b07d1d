"""A small configuration, and models of it: ours, transformers', and transformers' with our kernels."""

import copy

import pytest
import torch
from transformers import GPTNeoXConfig as StockConfig
from transformers.models.gpt_neox import modeling_gpt_neox as stock

from neox_hf import GPTNeoXConfig, GPTNeoXForCausalLM, apply_kernels
from tests.modeling.small import SMALL


@pytest.fixture
def make_config():
    def make(**fields):
        return GPTNeoXConfig(**(SMALL | fields))

    return make


@pytest.fixture
def make_model(make_config):
    def make(model_class=GPTNeoXForCausalLM, attention="sdpa", **fields):
        torch.manual_seed(0)
        return model_class._from_config(make_config(initializer_range=0.2, **fields), attn_implementation=attention)

    return make


@pytest.fixture
def make_stock():
    def make(model_class=stock.GPTNeoXForCausalLM, attention="sdpa", **fields):
        torch.manual_seed(0)
        config = StockConfig(**(SMALL | {"initializer_range": 0.2} | fields))
        model = model_class._from_config(config, attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()

    return make


@pytest.fixture
def make_pair(make_stock):
    """A stock model as it was, and its copy with our kernels."""

    def make(*args, kernels="torch", **fields):
        model = make_stock(*args, **fields)
        return model, apply_kernels(copy.deepcopy(model), kernels)

    return make


@pytest.fixture
def uncompiled():
    """transformers compiles flex attention, which takes a CPU half a minute; its plain form computes the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def tokens():
    """Random token ids int64 [rows, length], none of them 0."""

    def draw(rows=2, length=16):
        return torch.randint(1, SMALL["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0))

    return draw
