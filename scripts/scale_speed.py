"""The speed section of `scale.py`: each layout's tokens/s, TFLOP/s, memory and bubble, beside what was planned."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from layout_runs import Figures, run_ours, tokens_per_second
from peer_runs import run_peer
from scale_runs import WARMUP, SpeedRun, fitting

from neox_hf.modeling.accounting import flops_per_token
from neox_hf.modeling.settings import model_config
from neox_hf.planning import Device
from neox_hf.training.recipe import Recipe

Row = dict[str, Any]


def run_speed(
    runs: Sequence[SpeedRun], devices: int, device: Device | None, folder: Path, note: Callable[[Row], None]
) -> None:
    """Measure `runs` one after the other; `note` is told each row as it is known, and again with its bubble."""
    for each in runs:
        print(f"speed: {each.name}", flush=True)
        rows = [peer_row(each, devices, folder)] if each.peer else our_rows(each, device, folder)
        for row in rows:
            print(f"  {in_words(row)}", flush=True)
            note(row)


def our_rows(each: SpeedRun, device: Device | None, folder: Path) -> Iterator[Row]:
    """The row, and for a pipeline that with its bubble, for which it is run once more."""
    run, planned = fitting(each.run, device, folder)
    recipe = run.recipe(folder)
    figures = run_ours(run, folder, each.limit)
    row = measured(each, figures, recipe, run.world)
    row["recompute"] = str(recipe.train.activation_checkpointing or "none")
    if planned is not None:
        step = planned.step
        row["planned"] = {
            "tokens_per_second": step.tokens_per_second,
            "tflops": step.tflops_per_device,
            "peak_gib": planned.fullest.peak,
            "bubble": step.bubble,
        }
    yield row
    if figures and (shorter := each.shorter) is not None:
        half, _ = fitting(shorter.run, device, folder)
        print(f"  with {half.samples} samples a step, for the bubble", flush=True)
        halved = run_ours(half, folder, each.limit)
        yield row | bubbles(figures, halved, recipe.accumulation_steps(run.world), run.layout)


def peer_row(each: SpeedRun, devices: int, folder: Path) -> Row:
    figures = run_peer(each.peer, each.run, devices, folder, each.limit, **dict(each.options))
    return measured(each, figures, each.run.recipe(folder), devices)


def measured(each: SpeedRun, figures: Figures, recipe: Recipe, world: int) -> Row:
    """A row without figures is of a run that failed."""
    row = {"name": each.name, "model": each.model, "layout": each.layout, "peer": each.peer, "world": world}
    if not figures:
        return row
    config = model_config(recipe.model, tokens=recipe.tokenizer.vocab_size or 0, seq_length=recipe.data.seq_length)
    rate = tokens_per_second(figures, recipe.data.seq_length, WARMUP)
    flops = flops_per_token(config, recipe.data.seq_length)
    return {
        **row,
        "tokens_per_second": rate,
        "tflops": rate * flops / world / 1e12,
        "peak_gib": figures["peak_gib"],
        "reserved_gib": figures["reserved_gib"],
        "seconds": figures["seconds"],
        "samples": figures["samples"],
        "micro_batch": recipe.train.per_device_train_batch_size,
    }


def bubbles(figures: Figures, half: Figures, accumulation: int, layout: dict[str, int]) -> Row:
    """Shares of a step's time in which a stage waits.

    bubble: measured. What half the micro-batches save is their work without any waiting; what a step takes beyond twice
    that is the pipeline filling and emptying, and the optimizer. bubble_computed: (p - 1) / (m + p - 1).
    """
    stages = layout["pipeline"]
    computed = (stages - 1) / (accumulation + stages - 1)
    if not half:
        return {"bubble_computed": computed}
    whole, shorter = (statistics.median(each["seconds"][WARMUP:]) for each in (figures, half))
    return {"bubble": 1 - 2 * (whole - shorter) / whole, "bubble_computed": computed}


def in_words(row: Row) -> str:
    if "tokens_per_second" not in row:
        return f"{row['name']}: failed"
    return f"{row['name']}: {row['tokens_per_second']:,.0f} tokens/s, {row['tflops']:.1f} TFLOP/s a device"
