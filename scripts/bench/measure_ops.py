"""Accuracy of an op against an fp64 truth, and its time, by each implementation."""

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scripts.bench.case import Case
from scripts.bench.floors import Shapes
from scripts.bench.inputs import Inputs, Random
from scripts.bench.liger import NotInstalled
from scripts.bench.timing import op_ms

Row = dict[str, Any]

ALLOWED = 1.05
"""An error of ours may be this much of torch's at the same dtype: roundings fall out differently."""

NEGLIGIBLE = 1e-7

SETTLE_SECONDS = 1.0
"""Of an op with products, before it is timed: their floors, too, are at the clock that a card sustains. Timed at once,
on several H200s, linear + bias + GELU took 0.75 to 1.11 ms forward."""


def error(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """The largest relative error of any of the tensors, each by its norm."""
    return max(
        float((x.detach().double() - t).norm() / t.norm().clamp(min=1e-300)) for x, t in zip(found, truth, strict=True)
    )


def attempt(about: Row, measure: Callable[[], Row]) -> Row:
    """`about` with what is measured, or with why it could not be: one op that fails does not end the others."""
    try:
        return about | measure()
    except NotInstalled as missing:
        return about | {"failed": str(missing)}
    except (RuntimeError, ImportError, TypeError) as problem:
        return about | {"failed": f"{type(problem).__name__}: {problem}"[:300]}


def accuracy_row(op: str, dtype: torch.dtype, errors: Callable[[], tuple[float, float]]) -> Row:
    """errors: torch's and ours; `good` where ours is no further from the truth than torch's."""

    def compare() -> Row:
        stock, ours = errors()
        return {"torch": stock, "ours": ours, "good": ours <= ALLOWED * stock + NEGLIGIBLE}

    return attempt({"op": op, "dtype": str(dtype).removeprefix("torch.")}, compare)


def check_accuracy(case: Case, shapes: Shapes, device: torch.device, dtype: torch.dtype, backend: str = "auto") -> Row:
    """Errors of outputs and gradients together."""
    row = accuracy_row(case.name, dtype, lambda: _errors(case, shapes, device, dtype, backend))
    clear(device)
    return row


def _errors(case: Case, shapes: Shapes, device: torch.device, dtype: torch.dtype, backend: str) -> tuple[float, float]:
    def results(op: Callable[..., Any], inputs: Inputs) -> tuple[Tensor, ...]:
        outputs, gradients = inputs.forward_and_backward(op)
        return *outputs, *gradients

    def fresh() -> Inputs:
        return case.make(shapes, Random(device, dtype))

    truth = tuple(x.detach() for x in results(case.torch, fresh().in_fp64()))
    stock = error(results(case.torch, fresh()), truth)
    return stock, error(results(lambda *given: case.ours(*given, backend=backend), fresh()), truth)


def implementations(case: Case, backend: str) -> dict[str, Callable[[], Callable[..., Any]]]:
    """Makers, by name: what cannot be made says so by `NotInstalled`."""
    made: dict[str, Callable[[], Callable[..., Any]]] = {
        "ours": lambda: lambda *given: case.ours(*given, backend=backend),
        "torch": lambda: case.torch,
        "compile": lambda: torch.compile(case.compiled or case.torch, dynamic=False),
    }
    return made | ({"liger": case.liger} if case.liger else {})


def time_case(
    case: Case, shapes: Shapes, device: torch.device, wanted: list[str], backend: str = "auto"
) -> Iterator[Row]:
    """One row for each implementation, as soon as it is measured: ms forward, and forward and backward; and GiB that
    the second takes beyond its inputs, at most."""
    made = implementations(case, backend)
    settle_seconds = SETTLE_SECONDS if case.both(shapes).flops else 0.0

    def measure(name: str) -> Row:
        inputs = case.make(shapes, Random(device, torch.bfloat16))
        return _time(made[name](), inputs, name != "liger", settle_seconds)

    for name in case.timed:
        if name not in wanted or name not in made:
            continue
        yield attempt({"op": case.name, "by": name}, partial(measure, name))
        torch.compiler.reset()
        clear(device)


def _time(op: Callable[..., Any], inputs: Inputs, captured: bool, settle_seconds: float) -> Row:
    forward = op_ms(lambda: inputs.forward(op), captured=captured, settle_seconds=settle_seconds)
    both = op_ms(lambda: inputs.forward_and_backward(op), captured=captured, settle_seconds=settle_seconds)
    return {
        "forward_ms": forward.ms,
        "both_ms": both.ms,
        "how": both.how,
        "extra_gib": extra_gib(lambda: inputs.forward_and_backward(op)),
    }


def extra_gib(call: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def bounds(case: Case, shapes: Shapes) -> Row:
    """Floors and targets beside which the times stand, and by which implementations they are to be taken."""
    made = implementations(case, "auto")
    return {
        "op": case.name,
        "forward_floor_ms": case.forward(shapes).floor_ms,
        "both_floor_ms": case.both(shapes).floor_ms,
        "forward_target_ms": case.targets[0],
        "both_target_ms": case.targets[1],
        "most_gib": case.most_gib,
        "timed": [name for name in case.timed if name in made],
    }


def clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
