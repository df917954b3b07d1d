"""Where a training step of ours goes: the device's time by kernel, and how long the device is idle.

    python -m scripts.bench.profile 1.4b ours-bf16 [--steps 30] [--kernels 40] [--out profile.txt]

A profiled step begins on a device that has just paused, so it is some per cent quicker than the mean of the steps
before it, which the first line has too: the card is limited by its power.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from scripts.bench.sizes import SIZES, Size
from scripts.bench.steps import Ours
from scripts.bench.turns import peak_gib
from scripts.bench.variants import Variant, parse_variant

WARMUP = 5
PROFILED = 2
NO_DEVICE = 2


@dataclass(frozen=True)
class Span:
    """A kernel that ran: its name, when it began and when it ended, in microseconds."""

    name: str
    begin: float
    end: float


class Window(TrainerCallback):
    """Times the steps behind the warm-up, profiles the next two, and ends the run."""

    def __init__(self, steps: int) -> None:
        self.last = WARMUP + steps
        self.seconds = 0.0
        self.spans: list[Span] = []

    def is_over_after_step(self) -> bool:
        """The run ends here, and not by a clock."""
        return False

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == WARMUP:
            torch.cuda.reset_peak_memory_stats()
            self._begin = pause()
        if state.global_step == self.last:
            self.seconds = (pause() - self._begin) / (self.last - WARMUP)
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.last + PROFILED:
            pause()
            self._profile.__exit__(None, None, None)
            events = [event for event in self._profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
            self.spans = [Span(event.name, event.time_range.start, event.time_range.end) for event in events]
            control.should_training_stop = control.should_log = True


def pause() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def busy_microseconds(spans: Iterable[Span]) -> float:
    """How long at least one of them ran."""
    busy = end = 0.0
    for span in sorted(spans, key=lambda span: span.begin):
        busy += max(span.end - max(span.begin, end), 0.0)
        end = max(end, span.end)
    return busy


def by_kernel(spans: Iterable[Span]) -> list[tuple[str, float, int]]:
    """Name, microseconds and launches, those that take longest first."""
    found: dict[str, tuple[float, int]] = {}
    for span in spans:
        total, count = found.get(span.name, (0.0, 0))
        found[span.name] = total + span.end - span.begin, count + 1
    return sorted(((name, *figures) for name, figures in found.items()), key=lambda row: -row[1])


def text(title: str, spans: list[Span], steps: int, kernels: int) -> str:
    """The table, per step of `steps`."""
    whole = max(span.end for span in spans) - min(span.begin for span in spans)
    busy, milli = busy_microseconds(spans), 1e3 * steps
    lines = [
        f"{title}; profiled: {whole / milli:.1f} ms a step, {busy / milli:.1f} of them busy, {len(spans)} launches"
    ]
    lines += [
        f"{total / milli:9.3f} ms {count / steps:8.1f} x {name}" for name, total, count in by_kernel(spans)[:kernels]
    ]
    return "\n".join(lines) + "\n"


def measure(size: Size, variant: Variant, steps: int) -> tuple[str, list[Span]]:
    """A title with the mean step before the profile, and the profile."""
    window = Window(steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Ours(size, variant, torch.device("cuda"))._trainer(folder, window)
        trainer.add_callback(window)
        trainer.train()
    peak = peak_gib()
    title = f"{size.name} {variant.name}: {1e3 * window.seconds:.1f} ms a step"
    return f"{title}, {size.tokens / window.seconds:,.0f} tokens/s, {peak:.1f} GiB", window.spans


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m scripts.bench.profile", description=__doc__.split("\n")[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("variant", help="one of ours, as ours-bf16")
    parser.add_argument("--steps", type=int, default=30, help="timed before the profile")
    parser.add_argument("--kernels", type=int, default=40, help="lines")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    try:
        variant = parse_variant(options.variant)
    except ValueError as unknown:
        parser.error(str(unknown))
    if not variant.is_ours:
        parser.error(f"{options.variant} is a peer; a profile is of ours, as ours-{variant.precision}")
    if not torch.cuda.is_available():
        print("A profile needs a CUDA device, and there is none here.", file=sys.stderr)
        return NO_DEVICE
    title, spans = measure(SIZES[options.size], variant, options.steps)
    found = text(title, spans, PROFILED, options.kernels)
    print(found)
    if options.out is not None:
        options.out.write_text(found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
