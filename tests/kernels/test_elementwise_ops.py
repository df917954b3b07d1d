"""Bias and GELU; the closing sum of a parallel block."""

import math

import pytest
import torch

from neox_hf.kernels import bias_gelu, residual_add


def erf_form(z):
    return z / 2 * (1 + torch.erf(z / math.sqrt(2)))


def tanh_form(z):
    return z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


@pytest.mark.parametrize(("form", "written_out"), [("erf", erf_form), ("tanh", tanh_form)])
def test_bias_gelu(assert_follows, form, written_out):
    torch.manual_seed(0)
    x, bias = torch.randn(4, 6, 32) * 3, torch.randn(32)
    assert_follows(lambda *args: bias_gelu(*args, form), lambda x, bias: written_out(x + bias), (x, bias), 1e-5)
    assert_follows(lambda x: bias_gelu(x, None, form), written_out, (x,), 1e-5)


@pytest.mark.parametrize("form", ["erf", "tanh"])
def test_bias_is_added_before_rounding(form):
    torch.manual_seed(0)
    x, bias = torch.randn(64, 32).to(torch.bfloat16), torch.randn(32).to(torch.bfloat16)
    exact = bias_gelu(x.float(), bias.float(), form)
    assert torch.equal(bias_gelu(x, bias, form), exact.to(torch.bfloat16))


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="GELU form 'quick' is unknown; choose one of erf, tanh"):
        bias_gelu(torch.zeros(2), None, "quick")


def test_residual_add(assert_follows):
    torch.manual_seed(0)
    inputs = tuple(torch.randn(2, 3, 8) for _ in range(3))
    assert_follows(residual_add, lambda x, attention, mlp: x + attention + mlp, inputs, 1e-6)


def test_small_branches_are_summed_first():
    # At 256 a bf16 is 2 wide: each branch alone would vanish, together they count.
    x, branch = torch.tensor([256.0]).to(torch.bfloat16), torch.tensor([1.0]).to(torch.bfloat16)
    assert residual_add(x, branch, branch).item() == 258.0
