"""A stack of layers as CUDA graphs: its forward pass is one launch, and so is its backward pass.

A layer asks for some forty kernels and messages each way. Where the device is done with them sooner than Python has
asked, as with small models or layers that ranks share, it waits. A graph holds all of them, recorded once.

What a graph holds are addresses. So a captured pass has memory of its own for all that lies between its forward and its
backward pass, what goes in is copied to where it reads, and gradients of parameters are added, inside the graph, where
each parameter's `GradientSum` has them; who waits for them is told when the backward pass is through. Passes that are
under way at once, as in a pipeline, are captured one each.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neox_hf.kernels.once_differentiable import once_differentiable
from neox_hf.kernels.weight_gradient import AddInto, GradientSum, add_product_, sum_in, sum_of
from neox_hf.modeling.bare import is_watched

PATIENCE = 2
"""Passes of a shape that run as they are before one is captured: kernels are compiled and libraries started in them."""

MOST_SHAPES = 4
"""Shapes that have graphs, each with memory of its own. Batches of many lengths run the others as they are."""

CAPTURE = {"capture_error_mode": "thread_local"}
"""Other threads go on: the one that watches NCCL asks for events all the time."""

Shape = tuple[torch.Size, torch.dtype]
Run = Callable[[Tensor], Tensor]


class LayerGraphs:
    """Runs `layers` on hidden states of any shape that comes up often enough, in training alone.

    Whoever makes it vouches that the layers draw no random numbers, and that their weights stay where they are.

    takes: whether a graph is to hold the coming pass of these hidden states, asked before each; None is always.
    """

    def __init__(self, layers: Sequence[nn.Module], takes: Callable[[Tensor], bool] | None = None) -> None:
        self.layers = layers
        self._takes = takes
        self._seen: Counter[Shape] = Counter()
        self._idle: dict[Shape, list[_CapturedPass]] = {}
        self._parameters: list[nn.Parameter] = []
        self._sums: list[GradientSum] = []
        self._totals: list[Tensor] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model has other weights, and no graphs."""

    def take(self, layers: object, hidden: Tensor) -> bool:
        """Whether a graph runs this pass through `layers`; each question counts as a pass."""
        if layers is not self.layers or not hidden.requires_grad or not torch.is_grad_enabled():
            return False
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(hidden.device.type) or not self._are_plain():
            return False
        shape = (hidden.shape, hidden.dtype)
        self._seen[shape] += 1
        has_room = shape in self._idle or len(self._idle) < MOST_SHAPES
        return self._seen[shape] > PATIENCE and has_room and (self._takes is None or self._takes(hidden))

    def __call__(self, run: Run, hidden: Tensor) -> Tensor:
        """`run(hidden)` for one and the same function `run` of hidden states, with the gradients it has."""
        idle = self._idle.setdefault((hidden.shape, hidden.dtype), [])
        captured = idle.pop() if idle else self._capture(run, hidden)
        return _Replay.apply(self, captured, hidden)

    def _are_plain(self) -> bool:
        """Nothing is attached to the layers that wants to be asked, and nothing in them is computed again by torch."""
        if not all(layer.training and not getattr(layer, "gradient_checkpointing", False) for layer in self.layers):
            return False
        for module in (module for layer in self.layers for module in layer.modules()):
            if is_watched(module) or any(p is not None and p._backward_hooks for p in module._parameters.values()):
                return False
        return True

    def _capture(self, run: Run, hidden: Tensor) -> "_CapturedPass":
        self._find_sums()
        self.resume()
        with _stand_ins(self.layers, self._totals) as stand_ins:
            return _CapturedPass(run, hidden, stand_ins, self._totals)

    def _find_sums(self) -> None:
        if self._parameters:
            return
        trained = [p for layer in self.layers for p in layer.parameters() if p.requires_grad]
        self._parameters, self._sums = trained, [sum_of(parameter) for parameter in trained]
        assert all(self._sums), "a parameter's gradients are summed nowhere in particular"
        self._totals = [total.total(p) for p, total in zip(trained, self._sums, strict=True)]

    def resume(self) -> None:
        """See that each parameter's gradients are summed where the graphs add them."""
        rows = zip(self._parameters, self._sums, self._totals, strict=True)
        stale = [total for parameter, where, total in rows if where.resume(parameter, total)]
        if stale:
            torch._foreach_zero_(stale)

    def done(self, captured: "_CapturedPass") -> None:
        """Its backward pass is through; the next forward pass of its shape may have it."""
        self._idle[captured.hidden.shape, captured.hidden.dtype].append(captured)
        for parameter, where in zip(reversed(self._parameters), reversed(self._sums), strict=True):
            where.tell(parameter)


class _CapturedPass:
    """One forward and its backward pass. `hidden` and `gradient` are where they read, the others what they leave."""

    def __init__(self, run: Run, hidden: Tensor, parameters: Sequence[nn.Parameter], totals: list[Tensor]) -> None:
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # The backward pass runs on the stream of the forward pass.
        here = {"pool": torch.cuda.graph_pool_handle(), "stream": torch.cuda.Stream(), **CAPTURE}
        read = hidden.detach().clone().requires_grad_()
        with torch.cuda.graph(self.forward, **here):
            output = run(read)
        self.hidden, self.output = read.detach(), output.detach()
        self.gradient = torch.empty_like(self.output)
        with torch.cuda.graph(self.backward, **here):
            self.for_hidden, *found = torch.autograd.grad(output, [read, *parameters], self.gradient, allow_unused=True)
            _add(totals, found)


@contextmanager
def _stand_ins(layers: Sequence[nn.Module], totals: Sequence[Tensor]) -> Iterator[list[nn.Parameter]]:
    """Parameters in the same memory in place of the layers' own, of those that are trained in their order, which is
    that of `totals`, where their gradients are added.

    autograd remembers on which stream a parameter was used first, and has its gradient made there: no part of a graph.
    """
    own, stand_ins, into = [], [], iter(totals)
    for module in (module for layer in layers for module in layer.modules()):
        own.append((module, dict(module._parameters)))
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                module._parameters[name] = _stand_in_for(parameter, next(into))
                stand_ins.append(module._parameters[name])
    try:
        yield stand_ins
    finally:
        for module, parameters in own:
            module._parameters.update(parameters)


def _stand_in_for(parameter: nn.Parameter, total: Tensor) -> nn.Parameter:
    stand_in = nn.Parameter(parameter.detach())
    stand_in.grad_dtype = parameter.grad_dtype
    sum_in(stand_in, _AddTo(total))
    return stand_in


class _AddTo:
    """Adds the gradients of a stand-in to `total`. Nobody is told: that is for each replay to do."""

    def __init__(self, total: Tensor) -> None:
        self._total = total

    def add_product(self, stand_in: nn.Parameter, gradient: Tensor, x: Tensor, backend: str = "auto") -> None:
        add_product_(self._total, gradient, x, backend=backend)

    def add_by(self, stand_in: nn.Parameter, add: AddInto) -> None:
        add(self._total, True)


def _add(totals: list[Tensor], gradients: list[Tensor | None]) -> None:
    """Add to each total its gradient, where autograd was given one, in few launches."""
    pairs = [(total, g.view_as(total)) for total, g in zip(totals, gradients, strict=True) if g is not None]
    if not pairs:
        return
    into, summands = (list(side) for side in zip(*pairs, strict=True))
    if any(total.dtype != summand.dtype for total, summand in pairs):
        wide = [torch.empty_like(total) for total in into]
        torch._foreach_copy_(wide, summands)
        summands = wide
    torch._foreach_add_(into, summands)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graphs: LayerGraphs, captured: _CapturedPass, hidden: Tensor) -> Tensor:
        ctx.graphs, ctx.captured = graphs, captured
        captured.hidden.copy_(hidden)
        captured.forward.replay()
        return captured.output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        captured, ctx.captured = ctx.captured, None
        assert captured is not None, "a captured pass has one backward pass"
        captured.gradient.copy_(gradient)
        ctx.graphs.resume()
        captured.backward.replay()
        ctx.graphs.done(captured)
        return None, None, captured.for_hidden.detach()
