"""The norms' references."""

import pytest
import torch

from neox_hf import kernels
from neox_hf.kernels import dual_layer_norm, layer_norm, rms_norm, scale_norm
from tests.kernels.norm_cases import EPS, NAMES, TRUTHS, inputs_of, rms


def written_out(x, weight, bias):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + EPS).sqrt() * weight + bias


def test_layer_norm(assert_follows):
    torch.manual_seed(0)
    inputs = (torch.randn(3, 5, 48) * 3 + 2, torch.randn(48), torch.randn(48))
    assert_follows(lambda *args: layer_norm(*args, EPS), written_out, inputs, 1e-5)


def test_dual_layer_norm_is_two_layer_norms(assert_follows):
    torch.manual_seed(0)
    inputs = (torch.randn(3, 5, 48) * 3 + 2, *(torch.randn(48) for _ in range(4)))

    def truth(x, weight1, bias1, weight2, bias2):
        return written_out(x, weight1, bias1), written_out(x, weight2, bias2)

    assert_follows(lambda *args: dual_layer_norm(*args, EPS), truth, inputs, 1e-5)


def test_bfloat16_keeps_its_statistics_in_fp32():
    torch.manual_seed(0)
    x = (torch.randn(4, 512) + 30).to(torch.bfloat16)  # a mean that bf16 sums would lose
    one, zero = torch.ones(512, dtype=torch.bfloat16), torch.zeros(512, dtype=torch.bfloat16)
    truth = written_out(x.double(), 1.0, 0.0)
    assert (layer_norm(x, one, zero, EPS).double() - truth).abs().max() < 2**-7 * truth.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_references_follow_their_equations(assert_follows, name):
    inputs = inputs_of(name, (3, 5, 48), torch.float32)
    present = [x for x in inputs if x is not None]
    assert_follows(lambda *args: getattr(kernels, name)(*args, EPS), TRUTHS[name], present, 1e-5)


def test_partial_rms_norm_measures_the_first_elements(assert_follows):
    inputs = inputs_of("rms_norm", (3, 48), torch.float32)
    assert_follows(lambda *args: rms_norm(*args, EPS, measured=11), lambda *args: rms(*args, measured=11), inputs, 1e-5)


@pytest.mark.parametrize("measured", [0, 49])
def test_rms_norm_refuses_to_measure_what_is_not_there(measured):
    with pytest.raises(ValueError, match=f"rms_norm measures {measured} of 48 elements; choose from 1 to 48"):
        rms_norm(torch.ones(2, 48), torch.ones(48), EPS, measured=measured)


def test_eps_of_rms_norm_stands_beside_the_root():
    assert rms_norm(torch.ones(1, 4), torch.ones(4), 1.0).tolist() == [[0.5] * 4]


def test_rows_of_zeros_have_no_nan():
    x = torch.zeros(2, 4, requires_grad=True)
    (rms_norm(x, torch.ones(4), EPS) + scale_norm(x, torch.ones(()), EPS)).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "scale_norm"])
def test_rows_of_no_width(name):
    inputs = inputs_of(name, (3, 0), torch.float32)
    assert getattr(kernels, name)(*inputs, EPS).shape == (3, 0)


@pytest.mark.parametrize(("dtype", "weight_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "scale_norm"])
def test_results_have_the_dtype_of_x(name, dtype, weight_dtype):
    inputs = inputs_of(name, (2, 8), getattr(torch, dtype), weight_dtype=getattr(torch, weight_dtype))
    assert getattr(kernels, name)(*inputs, EPS).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("name", ["layer_norm", "add_layer_norm", "dual_layer_norm"])
def test_a_bias_may_be_wider_than_its_weight(name):
    inputs = inputs_of(name, (2, 8), torch.bfloat16)
    inputs[-1] = inputs[-1].float()
    results = [getattr(kernels, name)(*inputs, EPS, backend=backend) for backend in ("torch", "triton")]
    for ours, theirs in zip(*((y if isinstance(y, tuple) else (y,)) for y in results), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-6)


def test_under_autocast_layer_norm_is_torch_s():
    inputs = inputs_of("layer_norm", (2, 8), torch.bfloat16, weight_dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer_norm(*inputs, EPS), torch.nn.functional.layer_norm(inputs[0], (8,), *inputs[1:], EPS))
