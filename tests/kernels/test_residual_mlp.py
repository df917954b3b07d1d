"""The feed-forward half and the sum behind it as one node, and its first half alone: the interpreter against fp64."""

import pytest
import torch
from torch.nn import functional as F

from neox_hf.kernels import linear_gelu
from neox_hf.kernels.late_tensor import late_tensors, mark
from neox_hf.kernels.residual_mlp import MlpWeights, residual_mlp
from neox_hf.kernels.weight_gradient import SumInGrad, sum_in
from tests.kernels.elementwise_cases import written_out_gelu

TOKENS, HIDDEN, INNER = (2, 7), 16, 24
FORMS = ["erf", "tanh"]


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + sum(shape)))


def parameters(summed=True):
    shapes = (INNER, HIDDEN), (INNER,), (HIDDEN, INNER), (HIDDEN,), (HIDDEN,)
    made = [torch.nn.Parameter(values(*shape, seed=seed) * 0.3) for seed, shape in enumerate(shapes)]
    for each in made[::2][:2] if summed else ():
        sum_in(each, SumInGrad())
    return made


def streams():
    return [values(*TOKENS, HIDDEN, seed=seed).requires_grad_() for seed in (7, 8, 9)]


def in_double(tensors):
    return [each.detach().double().requires_grad_() for each in tensors]


def written_out(x, stream, branch, up, up_bias, down, down_bias, branch_bias, form):
    y = written_out_gelu(F.linear(x, up), up_bias, form)
    return stream + branch + branch_bias + F.linear(y, down, down_bias)


def close(found, exact):
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


def check_gradients(leaves, exact):
    for place, (leaf, truth) in enumerate(zip(leaves, exact, strict=True)):
        assert leaf.grad is not None, place
        close(leaf.grad, truth.grad)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("makes_again", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("summed", [False, True])
def test_the_node_is_what_it_says(form, makes_again, passes, summed):
    leaves = [*streams(), *parameters(summed)]
    exact = in_double(leaves)
    dout = values(*TOKENS, HIDDEN, seed=5)
    for _ in range(passes):
        options = {"makes_again": makes_again, "backend": "triton"}
        out = residual_mlp(*leaves[:3], MlpWeights(*leaves[3:]), form, **options)
        truth = written_out(*exact, form)
        close(out, truth)
        out.backward(dout)
        truth.backward(dout.double())
    check_gradients(leaves, exact)


def test_an_input_that_is_made_again_is_awaited():
    leaves = [*streams(), *parameters()]
    exact = in_double(leaves)
    (late,) = late_tensors(1, leaves[0])
    x = mark(leaves[0] * 1.0, late)
    out = residual_mlp(x, *leaves[1:3], MlpWeights(*leaves[3:]), "erf", backend="triton")
    out.sum().backward()
    up = leaves[3]
    assert up.grad is None
    assert late.is_awaited
    late.arrive(x.detach())
    written_out(*exact, "erf").sum().backward()
    check_gradients(leaves, exact)


@pytest.mark.parametrize("makes_again", [False, True])
def test_what_is_kept(makes_again):
    leaves, kept = [*streams(), *parameters()], {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        residual_mlp(*leaves[:3], MlpWeights(*leaves[3:]), "erf", makes_again=makes_again, backend="triton")
    inner = [x for x in kept.values() if x.shape == (*TOKENS, INNER)]
    assert len(inner) == (1 if makes_again else 2)


@pytest.mark.parametrize("frozen", [(1,), (3, 4), (1, 3, 4), (0,), (2,), (0, 2)])
@pytest.mark.parametrize("summed", [False, True])
def test_what_does_not_train_has_no_gradient(frozen, summed):
    leaves, weights = streams(), parameters(summed)
    for place in frozen:
        weights[place].requires_grad_(False)
    residual_mlp(*leaves, MlpWeights(*weights), "erf", backend="triton").sum().backward()
    assert [place for place, each in enumerate(weights) if each.grad is None] == list(frozen)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("summed", [False, True])
def test_a_linear_and_gelu(form, backend, summed):
    leaves = [streams()[0], *parameters(summed)[:2]]
    exact = in_double(leaves)
    y, dy = linear_gelu(*leaves, form, backend=backend), values(*TOKENS, INNER, seed=6)
    truth = written_out_gelu(F.linear(exact[0], exact[1]), exact[2], form)
    close(y, truth)
    y.backward(dy)
    truth.backward(dy.double())
    check_gradients(leaves, exact)


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("summed", [False, True])
def test_a_linear_and_gelu_of_which_a_part_does_not_train(frozen, summed):
    leaves = [streams()[0], *parameters(summed)[:2]]
    leaves[frozen].requires_grad_(False)
    exact = [each.detach().double().requires_grad_(each.requires_grad) for each in leaves]
    linear_gelu(*leaves, "erf", backend="triton").sum().backward()
    written_out_gelu(F.linear(exact[0], exact[1]), exact[2], "erf").sum().backward()
    for place, (leaf, truth) in enumerate(zip(leaves, exact, strict=True)):
        assert (leaf.grad is None) == (place == frozen)
        if place != frozen:
            close(leaf.grad, truth.grad)


@pytest.mark.parametrize("awaited", [False, True])
def test_what_a_linear_and_gelu_give_is_made_again_for_who_waits(awaited):
    leaves = [streams()[0], *parameters()[:2]]
    y = linear_gelu(*leaves, "erf", makes_again=True, backend="triton")
    arrived = []
    if awaited:
        y.late_tensor.when_there(arrived.append)
    y.sum().backward()
    assert len(arrived) == awaited
    if awaited:
        torch.testing.assert_close(arrived[0], y.detach())


def test_a_linear_and_gelu_wait_for_an_input_that_is_made_again():
    leaves = [streams()[0], *parameters()[:2]]
    exact = in_double(leaves)
    (late,) = late_tensors(1, leaves[0])
    linear_gelu(mark(leaves[0] * 1.0, late), *leaves[1:], "erf", backend="triton").sum().backward()
    assert leaves[1].grad is None
    late.arrive(leaves[0].detach())
    written_out_gelu(F.linear(exact[0], exact[1]), exact[2], "erf").sum().backward()
    check_gradients(leaves, exact)


def test_under_autocast_a_linear_and_gelu_are_torch_s():
    leaves = [streams()[0], *parameters(summed=False)[:2]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear_gelu(*leaves, "erf", backend="triton")
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("form", "x", "bias", "said"),
    [
        ("relu", (2, HIDDEN), INNER, "GELU form 'relu' is unknown"),
        ("erf", (2, HIDDEN + 1), INNER, "linear_gelu was given x [2, 17], a weight [24, 16] and a bias [24]"),
        ("erf", (2, HIDDEN), INNER - 1, "and a bias [23]"),
    ],
)
def test_what_does_not_fit_is_refused(form, x, bias, said):
    with pytest.raises(ValueError, match=r".*") as found:
        linear_gelu(torch.ones(x), torch.ones(INNER, HIDDEN), torch.ones(bias), form)
    assert said in str(found.value)
