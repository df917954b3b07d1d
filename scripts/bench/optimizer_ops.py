"""The optimizer's step and the gradient norm over all parameters of a model, beside torch's fused forms."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn

from neox_hf.kernels import AdamWRates, AdamWTensors, TensorTables, adamw_, clip_coefficient, gradient_norm
from neox_hf.kernels.split_fp32 import split_fp32
from neox_hf.modeling.causal_lm import GPTNeoXForCausalLM
from neox_hf.modeling.configuration import GPTNeoXConfig
from scripts.bench.floors import Work
from scripts.bench.measure_ops import Row, accuracy_row, attempt, clear, error
from scripts.bench.timing import op_ms

RATES = AdamWRates(lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)

# Bytes of each parameter, and what is owed for Pythia-1.4B.
NARROW, WIDE, CLIP_NARROW, CLIP_WIDE = "AdamW, bf16", "AdamW, fp32 master", "gradient norm, bf16", "gradient norm, fp32"
BESIDE = "AdamW, fp32 master beside the weight"
CAST = "cast fp32 masters to bf16"
BYTES = {NARROW: 14, WIDE: 28, BESIDE: 30, CLIP_NARROW: 2, CLIP_WIDE: 4, CAST: 0}
TARGETS = {NARROW: 5.2, WIDE: 10.0, CLIP_NARROW: 0.8, CLIP_WIDE: 1.5}


def parameter_shapes(config: GPTNeoXConfig) -> list[torch.Size]:
    with torch.device("meta"):
        return [parameter.shape for parameter in GPTNeoXForCausalLM(config).parameters()]


class State:
    """Weights, gradients and moments of one dtype; with masters, weights are bf16, and half of these or beside them.

    step: torch's fused AdamW or ours, over the same tensors.
    """

    def __init__(self, shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device, backend: str) -> None:
        self.backend = backend
        generator = torch.Generator(device).manual_seed(0)

        def values(scale: float) -> list[Tensor]:
            empty = (torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
            return [x.normal_(std=scale, generator=generator) for x in empty]

        self.weights = [nn.Parameter(x) for x in values(0.02)]
        for weight, gradient in zip(self.weights, values(1.0), strict=True):
            weight.grad = gradient
        self.gradients = [weight.grad for weight in self.weights]
        self.tables, self.norm_tables = TensorTables(), TensorTables()

    def stock(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            self.weights, RATES.lr, (RATES.beta1, RATES.beta2), RATES.eps, RATES.weight_decay, fused=True
        )

    def own(self, step: str) -> AdamWTensors:
        """step: `WIDE` is as our optimizer keeps masters, in two halves; `BESIDE` whole."""
        own = [weight.detach() for weight in self.weights]
        weights, masters = own, None
        if step == WIDE:
            weights, masters = map(list, zip(*map(split_fp32, own), strict=True))
        elif step == BESIDE:
            weights, masters = [weight.bfloat16() for weight in own], own
        return AdamWTensors(
            weights=weights,
            gradients=self.gradients,
            masters=masters,
            exp_avgs=[torch.zeros_like(x) for x in own],
            exp_avg_sqs=[torch.zeros_like(x) for x in own],
            steps=[torch.zeros((), device=x.device) for x in own],
        )

    def own_step(self, tensors: AdamWTensors) -> Callable[[], None]:
        return lambda: adamw_(tensors, RATES, tables=self.tables, backend=self.backend)

    def own_clip(self) -> Tensor:
        """The factor that the step applies: gradients are not written."""
        norm = gradient_norm(self.gradients, tables=self.norm_tables, backend=self.backend)
        return clip_coefficient(norm, 1.0)


def check_adamw(shapes: Sequence[torch.Size], device: torch.device, dtype: torch.dtype, backend: str = "auto") -> Row:
    """Weights after two steps, against torch's in fp64 from the same numbers."""
    return accuracy_row("AdamW", dtype, lambda: _errors(shapes, device, dtype, backend))


def _errors(
    shapes: Sequence[torch.Size], device: torch.device, dtype: torch.dtype, backend: str
) -> tuple[float, float]:
    truth = State(shapes, dtype, device, backend)
    truth.weights = [nn.Parameter(weight.detach().double()) for weight in truth.weights]
    for weight, gradient in zip(truth.weights, truth.gradients, strict=True):
        weight.grad = gradient.double()
    stock, ours = (State(shapes, dtype, device, backend) for _ in range(2))
    for state in (truth, stock):
        optimizer = state.stock()
        optimizer.step()
        optimizer.step()
    tensors = ours.own(NARROW)
    for _ in range(2):
        ours.own_step(tensors)()
    exact = tuple(weight.detach() for weight in truth.weights)
    return error(tuple(stock.weights), exact), error(tuple(ours.weights), exact)


def time_optimizer(shapes: Sequence[torch.Size], device: torch.device, backend: str = "auto") -> Iterator[Row]:
    """A row for each op and implementation. Not captured: torch's fused step counts on the host."""
    for dtype, steps, clip in ((torch.bfloat16, (NARROW,), CLIP_NARROW), (torch.float32, (WIDE, BESIDE), CLIP_WIDE)):
        calls = _calls(cache(partial(State, shapes, dtype, device, backend)), steps, clip)
        for (op, by), make in calls.items():
            yield attempt({"op": op, "by": by}, partial(timed, make))
            clear(device)
        del calls, make  # the state, which only they hold
        clear(device)


def _calls(
    state: Callable[[], State], steps: Sequence[str], clip: str
) -> dict[tuple[str, str], Callable[[], Callable[[], object]]]:
    """Makers of what is timed, by op and implementation; what has no room is made in none of them."""
    step = steps[0]
    calls = {(form, "ours"): lambda form=form: state().own_step(state().own(form)) for form in steps}
    calls[clip, "ours"] = lambda: state().own_clip
    calls[clip, "torch"] = lambda: lambda: nn.utils.clip_grad_norm_(state().weights, 1.0)
    calls[step, "torch"] = lambda: state().stock().step
    if step == WIDE:
        calls[CAST, "torch"] = lambda: partial(cast, [w.detach().bfloat16() for w in state().weights], state().weights)
    return calls


@torch.no_grad()
def cast(copies: list[Tensor], masters: Sequence[Tensor]) -> None:
    torch._foreach_copy_(copies, list(masters))


def timed(make: Callable[[], Callable[[], object]]) -> Row:
    timing = op_ms(make(), captured=False)
    return {"both_ms": timing.ms, "how": timing.how}


def optimizer_bounds(shapes: Sequence[torch.Size]) -> Iterator[Row]:
    parameters = sum(shape.numel() for shape in shapes)
    for op, size in BYTES.items():
        yield {
            "op": op,
            "both_floor_ms": Work(moved=size * parameters).floor_ms,
            "both_target_ms": TARGETS.get(op),
        }
