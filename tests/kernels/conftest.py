"""How the torch references are judged: against the written-out equation in fp64."""

import pytest
import torch


@pytest.fixture
def assert_follows():
    """Values and the gradient of every floating input equal those of an fp64 implementation, to `tolerance` of each
    tensor's largest element."""

    def check(function, truth, inputs, tolerance):
        ours = [leaf(x) for x in inputs]
        exact = [leaf(x.double() if is_float(x) else x) for x in inputs]
        found, wanted = as_tuple(function(*ours)), as_tuple(truth(*exact))
        weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in found]
        sum((x * w).sum() for x, w in zip(found, weights, strict=True)).backward()
        sum((x * w).sum() for x, w in zip(wanted, weights, strict=True)).backward()
        for name, a, b in [
            *((f"output {i}", *pair) for i, pair in enumerate(zip(found, wanted, strict=True))),
            *(
                (f"gradient {i}", a.grad, b.grad)
                for i, (a, b) in enumerate(zip(ours, exact, strict=True))
                if is_float(a)
            ),
        ]:
            worst = (a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)
            assert worst <= tolerance, f"{name}: {worst:.2e} of the largest element, over {tolerance:.0e}"

    return check


def is_float(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def leaf(x):
    return x.clone().requires_grad_() if is_float(x) else x


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)
