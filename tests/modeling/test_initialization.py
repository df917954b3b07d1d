"""Each method gives the spread that GPT-NeoX documents, and reaches the matrices it should."""

import math

import pytest
import torch
from torch import nn

from neox_hf import GPTNeoXForCausalLM
from neox_hf.modeling.initialization import INIT_METHODS

HIDDEN, LAYERS = 128, 6
STD = {
    "normal": 0.02,
    "scaled_normal": 0.02 / math.sqrt(2 * LAYERS),
    "single_residual_scaled_normal": 0.02 / math.sqrt(LAYERS),
    "small_init": 0.0559,  # as tabulated for Pythia-14M
    "wang_init": 0.0295,
}
OUTPUT_LAYERS = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")


def build(make_config, **fields):
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(
        make_config(
            hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=LAYERS, vocab_size=512, **fields
        )
    )


def test_table_is_complete():
    assert set(INIT_METHODS) == set(STD) | {"orthogonal", "scaled_orthogonal", "xavier_uniform", "xavier_normal"}


@pytest.mark.parametrize("method", STD)
def test_spread(method, make_config):
    ordinary = build(make_config, init_method=method, output_layer_init_method="normal")
    output = build(make_config, init_method="normal", output_layer_init_method=method)
    for name, weight in ordinary.named_parameters():
        if weight.ndim == 2:
            wanted = 0.02 if name.endswith(OUTPUT_LAYERS) else STD[method]
            assert weight.std().item() == pytest.approx(wanted, rel=0.03), name
            assert abs(weight.mean().item()) < 0.05 * wanted
    for name, weight in output.named_parameters():
        if weight.ndim == 2:
            assert weight.std().item() == pytest.approx(STD[method] if name.endswith(OUTPUT_LAYERS) else 0.02, rel=0.03)


def test_biases_and_norms(make_config):
    for module in build(make_config, init_method="small_init").modules():
        if isinstance(module, nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones(HIDDEN))
        if getattr(module, "bias", None) is not None:
            assert not module.bias.any()


@pytest.mark.parametrize(
    ("method", "gain"), [("orthogonal", math.sqrt(2)), ("scaled_orthogonal", math.sqrt(2 / LAYERS))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonal(method, gain, dtype, make_config):
    config = make_config(hidden_size=HIDDEN, num_hidden_layers=LAYERS)
    weight = torch.empty(HIDDEN, 2 * HIDDEN, dtype=dtype)
    INIT_METHODS[method](config)(weight)
    products = weight.double() @ weight.double().T
    assert torch.allclose(
        products, gain**2 * torch.eye(HIDDEN, dtype=torch.float64), atol=1e-5 if dtype.itemsize == 4 else 2e-2
    )


def test_xavier(make_config):
    weight = torch.empty(3 * HIDDEN, HIDDEN)
    INIT_METHODS["xavier_uniform"](make_config())(weight)
    assert weight.abs().max() <= math.sqrt(6 / (4 * HIDDEN))
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (4 * HIDDEN)), rel=0.03)
    INIT_METHODS["xavier_normal"](make_config())(weight)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (4 * HIDDEN)), rel=0.03)


def test_from_meta_device_everything_is_created(make_config, tmp_path):
    reference = build(make_config)
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(reference.config)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
    assert torch.equal(model.gpt_neox.rotary_emb.inv_freq, reference.gpt_neox.rotary_emb.inv_freq)
    assert torch.equal(model.gpt_neox.rotary_emb.original_inv_freq, reference.gpt_neox.rotary_emb.inv_freq)
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.03)
