"""Where one step of one rank goes: its device's kernels and copies by stream, what its busiest stream waits for, and
the memory that the allocator holds.

A profiled step is slower by what it takes to write it down, and quicker for the pause before it: compare its lines.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

LEAST_GAP = 3.0
"""Microseconds between two kernels from which on it is one that is told of."""

KERNELS, GAPS, NAME = 60, 15, 120
"""Lines of the tables, and letters of a kernel's name."""


class Launch(NamedTuple):
    """What ran on a device: microseconds."""

    begin: float
    end: float
    stream: int
    name: str


class StepProfile(TrainerCallback):
    """Profiles the last step of a run and writes what it found to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps - 1:
            _wait_for_device()
            activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
            self._profile = profile(activities=[activity])
            self._profile.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            _wait_for_device()
            self._profile.__exit__(None, None, None)
            self._path.write_text(text(launches(self._profile), pools()))


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def launches(found: profile) -> list[Launch]:
    """Of the device, in the order in which they began; without CUDA, torch's operations by thread."""
    wanted = torch.autograd.DeviceType.CUDA if torch.cuda.is_available() else torch.autograd.DeviceType.CPU
    events = [each for each in found.profiler.kineto_results.events() if each.device_type() == wanted]
    return sorted(
        Launch(
            each.start_ns() / 1e3, (each.start_ns() + each.duration_ns()) / 1e3, each.device_resource_id(), each.name()
        )
        for each in events
    )


def pools() -> list[str]:
    """A line for each pool of the allocator: that of what runs eagerly, and those of CUDA graphs."""
    if not torch.cuda.is_available():
        return []
    sizes: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for segment in torch.cuda.memory_snapshot():
        row = sizes[str(segment["segment_pool_id"])]
        row[0] += 1
        row[1] += segment["total_size"]
        row[2] += segment["allocated_size"]
    return [
        f"pool {name}: {count} segments, {held / 2**30:.2f} GiB held, {taken / 2**30:.2f} by tensors"
        for name, (count, held, taken) in sorted(sizes.items())
    ]


def by_stream(found: Iterable[Launch]) -> dict[int, float]:
    """Microseconds of what ran on each, the busiest first."""
    sums: dict[int, float] = defaultdict(float)
    for launch in found:
        sums[launch.stream] += launch.end - launch.begin
    return dict(sorted(sums.items(), key=lambda row: -row[1]))


def by_kernel(found: Iterable[Launch]) -> list[tuple[int, str, float, int]]:
    """Stream, name, microseconds and number, those that take longest first."""
    sums: dict[tuple[int, str], list[float]] = defaultdict(lambda: [0.0, 0])
    for launch in found:
        row = sums[launch.stream, launch.name]
        row[0] += launch.end - launch.begin
        row[1] += 1
    return sorted(((*key, total, count) for key, (total, count) in sums.items()), key=lambda row: -row[2])


def gaps(found: Sequence[Launch]) -> list[tuple[str, str, float, int]]:
    """Between which kernels of one stream nothing ran there: their names, microseconds, number; the longest first."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    before = found[0]
    for launch in found[1:]:
        if launch.begin - before.end > LEAST_GAP:
            row = sums[before.name, launch.name]
            row[0] += launch.begin - before.end
            row[1] += 1
        before = max(before, launch, key=lambda each: each.end)
    return sorted(((*key, total, count) for key, (total, count) in sums.items()), key=lambda row: -row[2])


def text(found: Sequence[Launch], memory: Sequence[str]) -> str:
    """The tables."""
    streams = by_stream(found)
    busiest = next(iter(streams))
    whole = max(launch.end for launch in found) - found[0].begin
    idle = gaps([launch for launch in found if launch.stream == busiest])
    busy = ", ".join(f"{stream}: {total / 1e3:.1f}" for stream, total in streams.items())
    return "\n".join(
        [
            f"{whole / 1e3:.1f} ms; by stream: {busy}; stream {busiest} idles {sum(row[2] for row in idle) / 1e3:.1f}",
            *memory,
            *(
                f"{total / 1e3:9.3f} ms {count:6d} x {total / count:9.1f} us  {stream:4d}  {name[:NAME]}"
                for stream, name, total, count in by_kernel(found)[:KERNELS]
            ),
            f"stream {busiest} waits:",
            *(
                f"{total / 1e3:9.3f} ms {count:6d} x  {before[: NAME // 2]} -> {after[: NAME // 2]}"
                for before, after, total, count in idle[:GAPS]
            ),
            "",
        ]
    )
