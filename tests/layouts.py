"""Trains one tiny recipe at a layout and returns its curve: loss and gradient norm of every step.

Everything is fp32 on gloo ranks, without dropout, so curves of different layouts differ by the order of sums alone.
"""

import json
from typing import Any

from tests.runs import Runs

Curve = list[tuple[float, float]]
"""(loss, gradient norm) by step."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "tp2": {"tensor": 2},
    "tp4": {"tensor": 4},
    "tp2-sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "pp4": {"pipeline": 4},
    "dp2": {"data": 2},
    "zero1": {"data": 2, "zero_stage": 1},
    "zero2": {"data": 2, "zero_stage": 2},
    "zero3": {"data": 2, "zero_stage": 3},
    "pp2-tp2": {"pipeline": 2, "tensor": 2},
    "pp2-tp2-dp2-sp": {"pipeline": 2, "tensor": 2, "data": 2, "sequence": True},
}

STEPS = 20
LAYERS = 4
"""As many as there are stages at most."""

FEW_LAYERS = 2
"""Half the messages between tensor ranks, which are what a curve takes its time for."""

SAMPLES = 8
"""In a step, at any data size."""


def train_curve(
    layout: dict[str, Any],
    runs: Runs,
    *overrides: str,
    layers: int = LAYERS,
    name: str | None = None,
    **options: Any,
) -> Curve:
    """The curve of a run with `layout`: `data` replicas (1 unless given) and fields of the `parallel:` section.

    overrides: of the recipe, such as `model.use_parallel_residual=false`. options: as for `Runs.start`.
    """
    overrides = (f"model.num_hidden_layers={layers}", *overrides)
    name = name or "-".join(f"{key}{value}" for key, value in layout.items()) or "single"
    codes = runs.run(name, *recipe_of(layout), *overrides, world_size=world_size(layout), **options)
    assert set(codes) == {0}, "\n".join(runs.message(name, rank)[-3000:] for rank, code in enumerate(codes) if code)
    return curve(json.loads((runs.folder / name / "trainer_state.json").read_text())["log_history"])


def curve(log: list[dict[str, float]]) -> Curve:
    """The curve that a log history tells."""
    return [(entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry]


def world_size(layout: dict[str, Any]) -> int:
    return layout.get("data", 1) * layout.get("tensor", 1) * layout.get("pipeline", 1)


def recipe_of(layout: dict[str, Any]) -> list[str]:
    """Overrides of the tiny recipe: 20 steps of 8 samples at the layout."""
    parallel = {key: value for key, value in layout.items() if key != "data"}
    return [
        *(f"parallel.{key}={str(value).lower()}" for key, value in parallel.items()),
        "model.hidden_dropout=0",
        f"train.max_steps={STEPS}",
        "train.learning_rate=1e-3",
        "train.max_grad_norm=1.0",
        "train.save_schedule=none",
        f"train.global_batch_size={SAMPLES}",
        "train.gradient_accumulation_steps=1",
        "train.per_device_train_batch_size=2",
        "data.streams=8",
    ]


def largest_difference(curve: Curve, other: Curve) -> float:
    """The largest relative difference of any loss or norm."""
    assert len(curve) == len(other) == STEPS
    return max(
        abs(ours - theirs) / abs(theirs)
        for here, there in zip(curve, other, strict=True)
        for ours, theirs in zip(here, there, strict=True)
    )
