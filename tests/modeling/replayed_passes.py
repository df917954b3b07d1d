"""Captured passes without a CUDA device: a replay computes again what a graph would."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from neox_hf.modeling import layer_graphs


class Replay:
    def __init__(self, compute) -> None:
        self.replay = compute


class ComputedPass:
    """What `LayerGraphs` asks of a captured pass: it reads `hidden` and `gradient`, and leaves the others, in place."""

    def __init__(self, layers, run, hidden: Tensor, parameters: Sequence[nn.Parameter], totals: list[Tensor]) -> None:
        self._run, self._parameters, self._totals = run, parameters, totals
        self.hidden = hidden.detach().clone()
        self.output, self.gradient = torch.empty_like(hidden), torch.empty_like(hidden)
        self.for_hidden = torch.empty_like(self.hidden)
        self._modules = [(m, dict(m._parameters)) for layer in layers for m in layer.modules()]
        self.forward, self.backward = Replay(self._compute), Replay(self._differentiate)

    def _compute(self) -> None:
        own = [(module, dict(module._parameters)) for module, _ in self._modules]
        for module, stand_ins in self._modules:
            module._parameters.update(stand_ins)
        try:
            with torch.enable_grad():
                self._read = self.hidden.clone().requires_grad_()
                self._output = self._run(self._read)
        finally:
            for module, parameters in own:
                module._parameters.update(parameters)
        self.output.copy_(self._output.detach())

    def _differentiate(self) -> None:
        read, *found = torch.autograd.grad(
            self._output, [self._read, *self._parameters], self.gradient, allow_unused=True
        )
        self.for_hidden.copy_(read)
        layer_graphs._add(self._totals, found)
