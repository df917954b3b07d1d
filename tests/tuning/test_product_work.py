"""The products that the tuner computes are those of a training step."""

from dataclasses import replace

import pytest
import torch

from neox_hf.kernels import product as product_module
from neox_hf.kernels.choice_file import Measured
from neox_hf.kernels.product import problem_of, torch_product_
from neox_hf.kernels.product_choice import kind_of
from neox_hf.kernels.weight_gradient import SumInGrad, sum_in
from neox_hf.modeling.causal_lm import GPTNeoXForCausalLM
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.tuning import compute_products, product_table, product_work
from neox_hf.tuning.inputs import Random
from neox_hf.tuning.product_work import linears_of
from tests.tuning.tiny import TINY

SIZES = replace(TINY, batch=2, sequence=16, hidden=64, inner=96, heads=4, head_size=16, vocabulary=None)


@pytest.fixture
def kinds(monkeypatch):
    """Those of all products that go through `product_`."""
    found = set()

    def product(out, a, b, bias, keep):
        found.add(kind_of(problem_of(out, a, b, bias)._replace(alignment=256)))
        torch_product_(out, a, b, bias, keep=keep)

    monkeypatch.setattr(product_module, "is_chosen", lambda backend, a, b: True)
    monkeypatch.setattr(product_module, "product", product)
    return found


@pytest.mark.parametrize("biased", [True, False])
def test_they_are_those_of_a_step(kinds, biased):
    config = GPTNeoXConfig(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_hidden_layers=1,
        vocab_size=32,
        attention_bias=biased,
        use_cache=False,
    )
    model = GPTNeoXForCausalLM(config).bfloat16()
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
        sum_in(parameter, SumInGrad())
    words = torch.randint(32, (2, 16))
    model(input_ids=words, labels=words).loss.backward()
    of_a_step = set(kinds)
    kinds.clear()
    compute_products(replace(SIZES, attention_bias=biased), Random(torch.device("cpu")))
    assert len(kinds) == 4 * 3
    # Where no kernel adds it, as on a CPU, the products of the MLP have a bias too.
    assert {kind.replace(" + bias", "") for kind in kinds} <= {kind.replace(" + bias", "") for kind in of_a_step}
    assert sum("bias" in kind for kind in kinds) == biased


def test_a_head_that_is_not_split_has_its_own():
    compute_products(replace(SIZES, vocabulary=32), Random(torch.device("cpu")))
    assert [linear.outputs for linear in linears_of(SIZES)] == [192, 64, 96, 64]


@pytest.mark.parametrize(
    ("fields", "one_node"),
    [({}, True), ({"dropout": 0.1}, False), ({"parallel_residual": False}, False), ({"vocabulary": None}, False)],
)
def test_a_feed_forward_half_that_is_one_node_has_its_own(fields, one_node, monkeypatch):
    found = []
    for name in ("gelu_product", "residual_product", "gelu_product_backward"):
        function = getattr(product_work, name)
        monkeypatch.setattr(
            product_work, name, lambda *given, name=name, function=function: found.append(name) or function(*given)
        )
    sizes = replace(SIZES, **({"vocabulary": 32, "dropout": 0.0, "attention_bias": True} | fields))
    compute_products(sizes, Random(torch.device("cpu")))
    wanted = ["gelu_product", "residual_product", "gelu_product_backward", "gelu_product_backward"]
    assert found == (wanted if one_node else [])


def test_the_table():
    table = product_table({"b": Measured("4200", 2.0, 1.5), "a": Measured(None, 1.0, 1.0)}).split("\n")
    assert table[0].split() == ["product", "torch", "ms", "best", "ms", "choice"]
    assert table[1].split() == ["a", "1.0000", "1.0000", "torch"]
    assert table[2].split() == ["b", "2.0000", "1.5000", "42"]
