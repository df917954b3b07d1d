"""Milliseconds of the device's own time, without what the host needs to launch.

An op is called many times inside a CUDA graph. Where capture is not legal (the op asks the device for a number, as
Liger's losses do), the calls wait in the device's queue behind a pause, until all of them are there.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

ROUND_MS = 20.0
"""Time that one round of calls shall take."""

MOST_CALLS = 50
ROUNDS = 5
PAUSE_CYCLES_PER_SECOND = 2e9
LONGEST_PAUSE_SECONDS = 0.2


@dataclass(frozen=True)
class Timing:
    """ms: median over rounds of the time of one call. how: `graph`; `queue`, with the reason where capture failed;
    `host` on a CPU."""

    ms: float
    how: str


def op_ms(call: Callable[[], object], *, captured: bool = True, settle_seconds: float = 0.0) -> Timing:
    """The time of `call` on the current CUDA device, or by the host's clock without one. captured: use a graph.
    settle_seconds: of untimed calls, in which the clock comes to what the card's power leaves it."""
    for _ in range(3):
        call()
    if not torch.cuda.is_available():
        return Timing(statistics.median(_host_ms(call) for _ in range(3)), "host")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    estimate = max(_between_events(lambda: [call() for _ in range(3)]) / 3, 1e-3)
    host_seconds = (time.perf_counter() - begin) / 3
    calls = int(min(MOST_CALLS, max(3, ROUND_MS / estimate)))
    one_round, how = None, "queue"
    if captured:
        try:
            one_round, how = _graph_round(call, calls), "graph"
        except RuntimeError as refusal:
            how = f"queue, for capture failed: {refusal}"[:200]
    return Timing(settled_median(one_round or _queue_round(call, calls, host_seconds), settle_seconds), how)


def _host_ms(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def _between_events(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def settled_median(one_round: Callable[[], float], settle_seconds: float) -> float:
    """The median of rounds, in ms, after others for so long that do not count."""
    end = time.perf_counter() + settle_seconds
    one_round()
    while time.perf_counter() < end:
        one_round()
    return statistics.median(one_round() for _ in range(ROUNDS))


def _graph_round(call: Callable[[], object], calls: int) -> Callable[[], float]:
    """What runs so many calls from a graph and says how long one takes, ms."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        call()  # what is set up for each stream is set up outside the graph
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    torch.cuda.synchronize()
    return lambda: _between_events(graph.replay) / calls


def _queue_round(call: Callable[[], object], calls: int, host_seconds: float) -> Callable[[], float]:
    """The same without a graph. The pause lasts until the host has launched all calls: the events then stand without
    gaps between them."""
    pause = int(PAUSE_CYCLES_PER_SECOND * min(LONGEST_PAUSE_SECONDS, 2 * host_seconds * calls))

    def one_round() -> float:
        torch.cuda._sleep(pause)
        return _between_events(lambda: [call() for _ in range(calls)]) / calls

    return one_round


class Laps:
    """Times between marks, taken without waiting for the device."""

    def __init__(self) -> None:
        self._marks: list = []

    def mark(self) -> None:
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return [begin.elapsed_time(end) for begin, end in pairs]
        return [1e3 * (end - begin) for begin, end in pairs]
