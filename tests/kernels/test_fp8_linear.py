"""Linears in eight bits: how near they are, and what they remember of weights and scales."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from neox_hf.kernels.fp8_format import E4M3, E5M2
from neox_hf.kernels.fp8_linear import Fp8Linear, fp8_linear, reason_against_fp8, slot_dtypes
from neox_hf.kernels.fp8_mlp import fp8_mlp
from neox_hf.kernels.fp8_product import fp8_product
from neox_hf.kernels.fp8_scales import Fp8Scales
from neox_hf.kernels.residual_add import residual_add
from neox_hf.kernels.weight_gradient import SumInGrad, sum_in
from tests.kernels.fp8_cases import check_linear, check_mlp


def a_linear(inputs: int = 32, outputs: int = 16, name: str = "it") -> tuple[Fp8Scales, Fp8Linear, nn.Linear]:
    table = Fp8Scales(slot_dtypes([name]), "cpu")
    return table, Fp8Linear(table, name), nn.Linear(inputs, outputs)


def run(layer: nn.Linear, state: Fp8Linear, x: torch.Tensor) -> torch.Tensor:
    return fp8_linear(x, layer.weight, layer.bias, state)


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_how_near_a_linear_is(backend, dtype, delayed):
    check_linear("cpu", backend, dtype, (37, 64, 48), delayed)


@pytest.mark.parametrize("form", ["erf", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_how_near_the_feed_forward_layer_is(backend, dtype, form):
    check_mlp("cpu", backend, dtype, (37, 32, 64), form)


def test_the_fused_layer_is_the_two_linears():
    table = Fp8Scales(slot_dtypes(["a", "b", "c", "d"]), "cpu")
    up, down = nn.Linear(32, 64), nn.Linear(64, 32)
    a, b, c, d = (Fp8Linear(table, name) for name in "abcd")
    x = torch.randn(20, 32)
    parameters = [up.weight, up.bias, down.weight, down.bias]
    for _ in range(2):
        fused = fp8_mlp(x, *parameters, "erf", (a, b))
        apart = run(down, d, F.gelu(run(up, c, x)))
        made = torch.autograd.grad(fused.square().mean(), parameters)
        expected = torch.autograd.grad(apart.square().mean(), parameters)
        torch.testing.assert_close(fused, apart, rtol=1e-3, atol=1e-3)
        for found, wanted in zip(made, expected, strict=True):
            assert (found - wanted).norm() < 0.01 * wanted.norm()
        table.advance()


@pytest.mark.parametrize("also", ["nothing", "a change in place"])
def test_a_gradient_that_two_linears_take_is_cast_once(also):
    table = Fp8Scales(slot_dtypes(["a", "b"]), "cpu")
    states = [Fp8Linear(table, name) for name in "ab"]
    layers = [nn.Linear(32, 16) for _ in states]
    x = torch.randn(20, 32)
    a, b = (run(layer, state, x) for layer, state in zip(layers, states, strict=True))
    gradient = torch.randn(20, 16)
    a.backward(gradient)
    if also == "a change in place":
        gradient.mul_(3)
    b.backward(gradient)
    assert (states[1].gradient.amax > 0) == (also == "a change in place")
    factor = 1 if also == "nothing" else 3
    assert layers[0].bias.grad is not layers[1].bias.grad
    torch.testing.assert_close(layers[1].bias.grad, factor * layers[0].bias.grad)
    assert layers[0].bias.grad.data_ptr() != layers[1].bias.grad.data_ptr()
    expected = factor * layers[0].weight.grad
    assert (layers[1].weight.grad - expected).norm() < (1e-6 if factor == 1 else 0.1) * expected.norm()


def test_both_halves_of_a_parallel_block_take_one_gradient():
    table = Fp8Scales(slot_dtypes(["a", "b"]), "cpu")
    states = [Fp8Linear(table, name) for name in "ab"]
    layers = [nn.Linear(32, 32) for _ in states]
    x = torch.randn(20, 32, requires_grad=True)
    halves = [run(layer, state, x) for layer, state in zip(layers, states, strict=True)]
    (residual_add(x, *halves, backend="triton") * torch.randn(20, 32)).sum().backward()
    assert sorted(float(state.gradient.amax) > 0 for state in states) == [False, True]


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_is_the_same(reentrant):
    table, state, layer = a_linear()
    x = torch.randn(20, 32, requires_grad=True)
    for _ in range(2):
        y = run(layer, state, x)
        again = checkpoint(lambda x: run(layer, state, x), x, use_reentrant=reentrant)
        assert torch.equal(y, again)
        leaves = x, layer.weight, layer.bias
        made = []
        for each in (y, again):
            each.square().sum().backward()
            made.append([leaf.grad for leaf in leaves])
            x.grad = layer.weight.grad = layer.bias.grad = None
        assert all(torch.equal(*pair) for pair in zip(*made, strict=True))
        table.advance()


def test_a_compiler_leaves_it_alone():
    table, state, layer = a_linear()
    x = torch.randn(4, 32)
    run(layer, state, x)
    table.advance()
    compiled = torch.compile(lambda x: 2 * run(layer, state, x), backend="aot_eager")
    y = compiled(x)
    y.sum().backward()
    assert torch.equal(y, 2 * run(layer, state, x))
    assert layer.weight.grad is not None


def test_shapes_alone():
    with torch.device("meta"):
        table, layer = Fp8Scales(slot_dtypes(["it"]), "meta"), nn.Linear(32, 16)
        x = torch.empty(2, 5, 32, requires_grad=True)
    for _ in range(2):
        y = run(layer, Fp8Linear(table, "it"), x)
        assert y.shape == (2, 5, 16)
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert layer.weight.grad.shape == (16, 32)
        table.advance()


def test_products_take_both_formats():
    a, b = torch.randn(5, 32).to(E5M2), torch.randn(16, 32).to(E4M3)
    half, two, bias = torch.tensor([0.5]), torch.tensor([2.0]), torch.randn(16)
    found = fp8_product(a, b, half, two, torch.float32, bias=bias)
    torch.testing.assert_close(found, a.float() @ b.float().t() + bias)


def test_a_weight_is_made_again_once_a_step_and_when_it_is_written_to():
    table, state, layer = a_linear()
    x = torch.randn(4, 32)
    made = []
    refresh = state.weight.refresh
    state.weight.refresh = lambda *arguments: (made.append(1), refresh(*arguments))
    run(layer, state, x)
    run(layer, state, x)
    assert len(made) == 1
    table.advance()
    run(layer, state, x)
    assert len(made) == 2
    with torch.no_grad():
        layer.weight.mul_(2)
    doubled = run(layer, state, x)
    assert len(made) == 3
    assert torch.equal(doubled - layer.bias, 2 * (run(layer, state, x) - layer.bias) / 2)
    layer.weight.data = torch.zeros(16, 32)
    assert torch.equal(run(layer, state, x), layer.bias.expand(4, 16))
    rows = state.weight.of(layer.weight).rows
    table.advance()
    assert state.weight.of(layer.weight).rows is rows


def test_gradients_are_summed_where_the_weight_says():
    _, state, layer = a_linear()
    layer = layer.bfloat16()
    layer.weight.grad_dtype = torch.float32
    x = torch.randn(24, 32).bfloat16().requires_grad_()
    heard = []
    layer.weight.register_post_accumulate_grad_hook(lambda weight: heard.append(weight.grad.clone()))
    sum_in(layer.weight, SumInGrad())
    for _ in range(2):
        run(layer, state, x).float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert len(heard) == 2
    assert torch.equal(heard[1], 2 * heard[0])
    wanted = x.detach().double().sum(0).expand(16, 32)
    assert (heard[0] - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_needs_no_gradient_gets_none(frozen):
    _, state, layer = a_linear()
    x = torch.randn(4, 32, requires_grad=frozen != "x")
    if frozen != "x":
        getattr(layer, frozen).requires_grad_(False)
    run(layer, state, x).sum().backward()
    grads = {"x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    assert {name for name, grad in grads.items() if grad is None} == {frozen}


def test_no_bias_and_no_tokens():
    _, state, layer = a_linear()
    y = fp8_linear(torch.empty(0, 32, requires_grad=True), layer.weight, None, state)
    assert y.shape == (0, 16)
    y.sum().backward()
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("place", ["x", "dy", "weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_the_gradients(place, value):
    table, state, layer = a_linear()
    for _ in range(2):
        x, dy = torch.randn(20, 32), torch.randn(20, 16)
        run(layer, state, x).backward(dy)
        table.advance()
    layer.zero_grad()
    with torch.no_grad():
        {"x": x, "dy": dy, "weight": layer.weight}[place][3, 4] = value
    x.requires_grad_()
    y = run(layer, state, x)
    y.backward(dy)
    assert y.isnan().any() == (place != "dy")
    assert x.grad.isnan().any() == (place != "x")
    assert layer.weight.grad.isnan().any() == (place != "weight")


def test_a_step_between_forward_and_backward_is_an_error():
    table, state, layer = a_linear()
    run(layer, state, torch.randn(4, 32)).sum().backward()
    table.advance()
    y = run(layer, state, torch.randn(4, 32))
    table.advance()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_sizes_that_do_not_fit():
    weight = torch.zeros(24, 32)
    assert reason_against_fp8(torch.zeros(48, 32)) is None
    assert "[24, 32], and eight-bit products want multiples of 16" in reason_against_fp8(weight)
    _, state, layer = a_linear()
    with pytest.raises(ValueError, match="leave it in bf16"):
        fp8_linear(torch.zeros(4, 32), weight, None, state)
    with pytest.raises(ValueError, match=r"given x \[4, 16\] for a weight \[16, 32\]"):
        run(layer, state, torch.zeros(4, 16))
    with pytest.raises(ValueError, match=r"up \[16, 32\] and down \[16, 32\]"):
        fp8_mlp(torch.zeros(4, 32), layer.weight, None, layer.weight, None, "erf", (state, state))
