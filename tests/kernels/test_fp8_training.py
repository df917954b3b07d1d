"""A small network trained in eight bits, beside half precision, on two tasks: one with noise and one without.

As a language model does, the first learns to guess what another network draws: its loss has a floor that no rounding
moves. The second learns what that network computes, to the end, where the rounding of the forward pass alone is a part
of the loss; what was learned is told there by the weights, which are evaluated in half precision.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neox_hf.kernels.fp8_linear import Fp8Linear, slot_dtypes
from neox_hf.kernels.fp8_mlp import fp8_mlp
from neox_hf.kernels.fp8_scales import Fp8Scales

NAMES = ("up", "down")


class Student:
    """Two linears of bf16 weights with fp32 masters, trained as bf16 or fp8, and the network it learns from."""

    def __init__(self, precision: str, seed: int = 3) -> None:
        torch.manual_seed(seed)
        self.teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 16))
        self.up, self.down = nn.Linear(32, 64).bfloat16(), nn.Linear(64, 16).bfloat16()
        self.parameters = [self.up.weight, self.up.bias, self.down.weight, self.down.bias]
        self.masters = [parameter.detach().float() for parameter in self.parameters]
        self.optimizer = torch.optim.Adam(self.masters, lr=3e-3)
        self.table = Fp8Scales(slot_dtypes(NAMES), "cpu") if precision == "fp8" else None
        self._find_states()

    def _find_states(self) -> None:
        self.states = self.table and tuple(Fp8Linear(self.table, name) for name in NAMES)

    def __call__(self, x: Tensor) -> Tensor:
        if self.table is None:
            return self.down(F.gelu(self.up(x.bfloat16()))).float()
        return fp8_mlp(x.bfloat16(), *self.parameters, "erf", self.states).float()

    def evaluated(self, precision: str) -> float:
        """The squared error of its weights, over inputs that it has not seen."""
        x = torch.randn(4096, 32)
        self.table = Fp8Scales(slot_dtypes(NAMES), "cpu") if precision == "fp8" else None
        self._find_states()
        with torch.no_grad():
            return F.mse_loss(self(x), self.teacher(x)).item()

    def drawn(self, x: Tensor) -> Tensor:
        labels = torch.distributions.Categorical(logits=10 * self.teacher(x)).sample()
        return F.cross_entropy(self(x), labels)

    def computed(self, x: Tensor) -> Tensor:
        return F.mse_loss(self(x), self.teacher(x).detach())

    def learn(self, task: str, steps: int = 50, stop: int | None = None) -> list[float]:
        """Losses. stop: the step before which the scales are saved, thrown away and loaded."""
        losses = []
        for step in range(steps):
            if step == stop:
                saved, self.table = self.table.state_dict(), Fp8Scales(slot_dtypes(NAMES), "cpu")
                self.table.load_state_dict(saved)
                self._find_states()
            loss = getattr(self, task)(torch.randn(256, 32))
            self._update(torch.autograd.grad(loss, self.parameters))
            losses.append(loss.item())
        return losses

    def _update(self, gradients: tuple[Tensor, ...]) -> None:
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient.float()
        self.optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.copy_(master)
        if self.table is not None:
            self.table.advance()


def test_it_trains_as_half_precision_does():
    half, eight = (Student(precision).learn("drawn") for precision in ("bf16", "fp8"))
    assert sum(half[-5:]) < 0.8 * sum(half[:5])
    assert sum(eight[-5:]) == pytest.approx(sum(half[-5:]), rel=5e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_without_noise_its_weights_are_as_good(seed):
    found = {}
    for trained in ("bf16", "fp8"):
        student = Student(trained, seed)
        losses = student.learn("computed")
        assert losses[-1] < 0.1 * losses[0]
        for precision in ("bf16", "fp8"):
            torch.manual_seed(9)
            found[trained, precision] = student.evaluated(precision)
    assert found["fp8", "bf16"] < 1.01 * found["bf16", "bf16"]
    # What a forward pass in eight bits adds, it adds to half precision's weights too.
    assert found["bf16", "fp8"] > 1.005 * found["bf16", "bf16"]
    assert found["fp8", "fp8"] < 1.01 * found["bf16", "fp8"]


def test_a_run_that_was_resumed_goes_on_as_it_would_have():
    assert Student("fp8").learn("drawn", 8, stop=5) == Student("fp8").learn("drawn", 8)
