"""Layer norm, and two at once."""

import torch

from neox_hf.kernels import dual_layer_norm, layer_norm

EPS = 1e-5


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
