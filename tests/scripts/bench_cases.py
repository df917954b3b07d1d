"""Shapes and documents for the benchmark's tests."""

from scripts.bench import report
from scripts.bench.floors import Shapes

TINY = Shapes(batch=1, sequence=6, heads=2, head_size=16, inner=48, vocabulary=40, rotary=8)


def step(tokens_s, **more):
    return {
        "ms": 1e3 * 16384 / tokens_s,
        "tokens_s": tokens_s,
        "tflops": 500.0,
        "mfu": 0.8,
        "peak_gib": 30.0,
        "turn_ms": [240.0, 250.0],
        "steps": 30,
        "loss": 10.0,
        **more,
    }


def document():
    """A little of everything that a run can have measured."""
    whole = report.empty()
    ceilings = {"copy_gb_s": 4284.0, "burst_tflops": 775.0, "sustained_tflops": 675.0}
    run = {"date": "2026-11-22", "device": "a card", "versions": "torch 2", "command": "make bench"}
    whole["runs"] = [run | {"ceilings": ceilings}]
    whole["accuracy"] = [
        {"op": "GELU", "dtype": "bfloat16", "torch": 2e-3, "ours": 1e-3, "good": True},
        {"op": "rotary", "dtype": "bfloat16", "torch": 1e-3, "ours": 2e-3, "good": False},
    ]
    floors = {"forward_floor_ms": 0.125, "both_floor_ms": 0.313}
    owed = {"forward_target_ms": 0.138, "both_target_ms": 0.345, "most_gib": 0.6}
    timed = ["ours", "torch", "liger", "compile"]
    whole["ops"]["bounds"] = [{"op": "GELU", **floors, **owed, "timed": timed}]
    whole["ops"]["rows"] = [
        {"op": "GELU", "by": "ours", "forward_ms": 0.13, "both_ms": 0.33, "extra_gib": 0.5},
        {"op": "GELU", "by": "torch", "forward_ms": 0.171, "both_ms": 0.4, "extra_gib": 0.5},
        {"op": "GELU", "by": "liger", "failed": "liger-kernel is not installed"},
    ]
    whole["steps"]["1.4b"] = {
        "ours-bf16": step(66e3),
        "ours-pure_bf16": step(68e3),
        "eager-amp": step(48e3),
        "eager-bf16": step(53e3),
        "fixed-amp": step(60e3),
        "tuned-amp": step(55e3),
        "tuned-bf16": {"failed": "liger-kernel is not installed"},
    }
    return whole
