"""One turn of a variant: some load first, for clocks and caches to settle, then steps that are timed one by one."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from scripts.bench.timing import Laps


@dataclass(frozen=True)
class TurnLength:
    """Seconds of load before, seconds that are timed, and the fewest steps of both."""

    warm_seconds: float = 2.0
    seconds: float = 3.0
    warm_steps: int = 3
    steps: int = 5


PREPARING = TurnLength(0.0, 0.0, 2, 1)
"""What compiles everything that a turn needs."""


class TurnClock:
    """Called after each step, says when the turn is over. It never waits for the device before that."""

    def __init__(self, length: TurnLength) -> None:
        self.length = length
        self.laps: Laps | None = None
        self._steps = 0
        self._begin: float | None = None

    def is_over_after_step(self) -> bool:
        self._steps += 1
        now = time.perf_counter()
        if self._begin is None:  # the first step may have compiled, and is no load yet
            self._begin = now
        if self.laps is not None:
            self.laps.mark()
            return now - self._begin >= self.length.seconds and self._steps >= self.length.steps
        if now - self._begin >= self.length.warm_seconds and self._steps >= self.length.warm_steps:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self.laps, self._steps, self._begin = Laps(), 0, now
            self.laps.mark()
        return False

    def result(self, loss: float) -> dict[str, Any]:
        """ms of each timed step; peak GiB while they ran; the loss at the end."""
        assert self.laps is not None, "a turn ends after timed steps"
        peak = peak_gib() if torch.cuda.is_available() else 0.0
        return {"step_ms": self.laps.milliseconds(), "peak_gib": peak, "loss": loss}


def peak_gib() -> float:
    """Of what was allocated, and of what CUDA graphs keep for their replays, which is free to the allocator alone."""
    pools = (segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != (0, 0))
    kept = sum(segment["total_size"] - segment["allocated_size"] for segment in pools)
    return (torch.cuda.max_memory_allocated() + kept) / 2**30
