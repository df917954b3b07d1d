"""A weight's gradient, summed by the products that make it, is what autograd would have summed in fp32."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neox_hf.kernels.linear import linear
from neox_hf.kernels.weight_gradient import SumInGrad, add_product_, sum_in


def a_linear(dtype: torch.dtype = torch.bfloat16, summing: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    layer = nn.Linear(6, 4, dtype=dtype)
    for parameter in layer.parameters():
        parameter.grad_dtype = torch.float32
    if summing:
        sum_in(layer.weight, SumInGrad())
    return layer


def backward(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    x.requires_grad_()
    y = linear(x, layer.weight, layer.bias)
    y.backward(torch.ones_like(y) * x[..., :4].detach())
    return y


def test_values_and_gradients_are_torch_s():
    layer, plain = a_linear(), a_linear(summing=False)
    for number in range(3):
        x, same = (torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(number)).bfloat16() for _ in range(2))
        y = backward(layer, x.requires_grad_())
        other = F.linear(same.requires_grad_(), plain.weight, plain.bias)
        other.backward(torch.ones_like(other) * same[..., :4].detach())
        assert torch.equal(y, other)
        assert torch.equal(x.grad, same.grad)
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=0, atol=0.1)  # torch's is rounded to bf16
    assert torch.equal(layer.bias.grad, plain.bias.grad)


def test_the_sum_is_not_rounded():
    layer, truth = a_linear(), torch.zeros(4, 6, dtype=torch.float64)
    for _ in range(4):
        x = torch.randn(3, 6).bfloat16()
        backward(layer, x)
        truth += x.detach()[:, :4].double().t() @ x.detach().double()
    torch.testing.assert_close(layer.weight.grad.double(), truth, rtol=1e-6, atol=1e-6)


def test_hooks_hear_of_every_product():
    layer, heard = a_linear(), []
    layer.weight.register_post_accumulate_grad_hook(lambda weight: heard.append(weight.grad.clone()))
    backward(layer, torch.ones(1, 6).bfloat16())
    backward(layer, torch.ones(1, 6).bfloat16())
    assert [total.unique().tolist() for total in heard] == [[1.0], [2.0]]


def test_a_weight_that_is_watched_gets_its_gradients_from_autograd():
    layer, seen = a_linear(), []
    layer.weight.register_hook(lambda gradient: seen.append(gradient.shape))
    backward(layer, torch.ones(1, 6).bfloat16())
    assert seen == [(4, 6)]
    assert layer.weight.grad.unique().tolist() == [1.0]


def test_a_buffer_that_is_there_is_added_to():
    layer = a_linear()
    layer.weight.grad = buffer = torch.full((4, 6), 5.0)
    backward(layer, torch.ones(1, 6).bfloat16())
    assert layer.weight.grad is buffer
    assert buffer.unique().tolist() == [6.0]


@pytest.mark.parametrize("why", ["no grad", "frozen"])
def test_nothing_is_summed(why):
    layer = a_linear()
    layer.weight.requires_grad_(why != "frozen")
    x = torch.ones(1, 6).bfloat16().requires_grad_()
    with torch.set_grad_enabled(why != "no grad"):
        y = linear(x, layer.weight, layer.bias)
    if why == "frozen":
        y.sum().backward()
        assert x.grad is not None
    assert layer.weight.grad is None


def test_a_compiled_graph_leaves_it_to_autograd():
    layer = a_linear(torch.float32)
    compiled = torch.compile(lambda x: linear(x, layer.weight, layer.bias), backend="aot_eager", fullgraph=True)
    compiled(torch.ones(1, 6, requires_grad=True)).sum().backward()
    assert layer.weight.grad.unique().tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_products(dtype, device):
    a, b = torch.randn(7, 4, device=device).to(dtype), torch.randn(7, 6, device=device).to(dtype)
    exact = (a.double().t() @ b.double()).float()
    total = torch.full((4, 6), math.nan, device=device)
    add_product_(total, a, b, keep=False)
    torch.testing.assert_close(total, exact, rtol=1e-5, atol=1e-5)
    add_product_(total, a, b)
    torch.testing.assert_close(total, 2 * exact, rtol=1e-5, atol=1e-5)
