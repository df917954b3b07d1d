"""A small configuration and a model of it."""

import pytest
import torch

from neox_hf import GPTNeoXConfig, GPTNeoXForCausalLM
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
