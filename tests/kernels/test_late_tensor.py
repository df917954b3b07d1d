"""A linear keeps nothing of an input that the backward pass makes again, and its weight's gradient does not change."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neox_hf.kernels.late_tensor import LateTensor, late_form, mark
from neox_hf.kernels.linear import linear
from neox_hf.kernels.weight_gradient import SumInGrad, sum_in


class _Double(torch.autograd.Function):
    """y = 2x, made again where it is awaited."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, late: LateTensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.late = late
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        assert ctx.late.is_awaited
        ctx.late.arrive(2 * x)
        return 2 * gradient, None


def double(x: Tensor) -> Tensor:
    late = LateTensor()
    return mark(_Double.apply(x, late), late)


@pytest.fixture
def layers() -> list[nn.Linear]:
    made = [nn.Linear(4, 3), nn.Linear(4, 5, bias=False)]
    for layer in made:
        sum_in(layer.weight, SumInGrad())
    return made


def test_gradients_are_those_of_an_input_that_is_kept(layers):
    x = torch.randn(2, 6, 4, requires_grad=True)
    same = x.detach().clone().requires_grad_()
    plain = [nn.Linear(4, 3), nn.Linear(4, 5, bias=False)]
    for layer, other in zip(layers, plain, strict=True):
        other.load_state_dict(layer.state_dict())
    y, z = double(x), 2 * same
    sum(linear(y, layer.weight, layer.bias).square().sum() for layer in layers).backward()
    sum(layer(z).square().sum() for layer in plain).backward()
    torch.testing.assert_close(x.grad, same.grad)
    for layer, other in zip(layers, plain, strict=True):
        for ours, theirs in zip(layer.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_nothing_of_it_is_kept(layers):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = double(torch.randn(6, 4, requires_grad=True))
        linear(y, layers[0].weight, layers[0].bias)
    assert not any(tensor.shape == y.shape and torch.equal(tensor, y) for tensor in kept)


def test_a_weight_whose_gradients_autograd_sums_keeps_it():
    layer = nn.Linear(4, 3)
    y = (2 * torch.randn(6, 4)).requires_grad_()
    assert late_form(y) is None
    linear(y, layer.weight, layer.bias).sum().backward()
    assert layer.weight.grad is not None


def test_what_has_no_gradient_is_not_marked():
    with pytest.raises(AssertionError, match="nothing runs its op's backward pass"):
        mark(torch.ones(2), LateTensor())
