"""Bias and GELU; what closes a residual block; causal softmax: the references."""

import math

import pytest
import torch

from neox_hf.kernels import bias_dropout_residual, bias_gelu, causal_softmax, draw_dropout_seed, residual_add


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


def test_a_bias_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"given a bias \[3\] for x \[2, 4\]; it wants \[F\]"):
        bias_gelu(torch.zeros(2, 4), torch.zeros(3), "erf")


def test_residual_add(assert_follows):
    torch.manual_seed(0)
    inputs = tuple(torch.randn(2, 3, 8) for _ in range(3))
    assert_follows(residual_add, lambda x, attention, mlp: x + attention + mlp, inputs, 1e-6)


def test_small_branches_are_summed_first():
    # At 256 a bf16 is 2 wide: each branch alone would vanish, together they count.
    x, branch = torch.tensor([256.0]).to(torch.bfloat16), torch.tensor([1.0]).to(torch.bfloat16)
    assert residual_add(x, branch, branch).item() == 258.0


def test_bias_dropout_residual_without_dropout(assert_follows):
    x, first, second = torch.randn(3, 2, 3, 8).unbind()
    bias1, bias2 = torch.randn(2, 8).unbind()
    assert_follows(
        bias_dropout_residual,
        lambda x, first, bias1, second, bias2: x + first + bias1 + second + bias2,
        (x, first, bias1, second, bias2),
        1e-6,
    )
    assert_follows(bias_dropout_residual, torch.add, (x, first), 1e-6)
    small = torch.tensor([1.0]).to(torch.bfloat16)
    assert bias_dropout_residual(torch.tensor([256.0]).to(torch.bfloat16), small, None, small).item() == 258.0


def test_bias_dropout_residual_drops():
    x, branch, bias = torch.zeros(100, 64), torch.full((100, 64), 2.0), torch.ones(64)
    seed = draw_dropout_seed(torch.device("cpu"))
    assert (seed.dtype, seed.shape) == (torch.int64, (1,))
    y = bias_dropout_residual(x, branch, bias, probability=0.25, seed=seed)
    assert set(y.unique().tolist()) == {0.0, 4.0}
    assert abs((y == 0).double().mean() - 0.25) < 0.03
    assert (bias_dropout_residual(x, branch, bias, probability=0.25) == 3).all()


def test_misfits_of_bias_dropout_residual_are_refused():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"dropout of 1.5 is no probability; it lies between 0 and 1"):
        bias_dropout_residual(x, x, probability=1.5)
    with pytest.raises(ValueError, match="given bias2 without second"):
        bias_dropout_residual(x, x, bias2=torch.zeros(4))
    with pytest.raises(ValueError, match=r"given first \[4\] for x \[2, 4\]; it wants \[2, 4\]"):
        bias_dropout_residual(x, torch.zeros(4))


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7)])
def test_causal_softmax(assert_follows, queries, keys):
    mask = torch.randn(2, 1, queries, keys)
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)

    def written_out(scores, mask):
        weights = torch.exp(0.5 * scores + mask).masked_fill(hidden, 0)
        return weights / weights.sum(-1, keepdim=True)

    scores = torch.randn(2, 3, queries, keys)
    assert_follows(lambda x: causal_softmax(x, 0.5, mask), lambda x: written_out(x, mask.double()), (scores,), 1e-6)
    assert_follows(lambda x: causal_softmax(x, 0.5), lambda x: written_out(x, 0), (scores,), 1e-6)


def test_misfits_of_causal_softmax_are_refused():
    scores = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"given scores \[3, 4, 4\]; it wants"):
        causal_softmax(scores[0], 1.0)
    with pytest.raises(ValueError, match=r"given a mask \[4, 4\] for scores \[2, 3, 4, 4\]; it wants"):
        causal_softmax(scores, 1.0, torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"given a mask \[3, 1, 4, 4\]"):
        causal_softmax(scores, 1.0, torch.zeros(3, 1, 4, 4))
    with pytest.raises(ValueError, match=r"given a mask of torch\.bool; it is added"):
        causal_softmax(scores, 1.0, torch.ones(1, 1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="no gradient for its mask; detach it"):
        causal_softmax(scores, 1.0, torch.zeros(1, 1, 4, 4, requires_grad=True))
