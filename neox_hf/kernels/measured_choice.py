"""What is quickest on a device: found by measuring, once, and remembered on disk.

What counts is time in training, when the card is limited by its power: the clock of each candidate is then what its
energy leaves it, and one that takes fewer cycles but more energy loses. So all are timed briefly, and those in front
once more, each long enough by itself that the clock settles. That takes about a second. Later runs on a device of that
name read what was found: they choose alike.
"""

import statistics
import threading
import time
from collections.abc import Callable, Mapping

import torch

from neox_hf.kernels.choice_file import ChoiceFile, Measured

MARGIN = 0.01
"""By how much a candidate must be quicker than what computes otherwise: less, and chance would choose."""

QUICK_ROUNDS, QUICK_CALLS = 5, 2
"""Turns, and calls in each, by which the finalists are found. The median counts, since clocks drift."""

FINALISTS = 4
"""Beside what computes otherwise. The one that wins at the clock it is left has been up to 4 % behind in cycles."""

STEADY_ROUNDS, STEADY_MS = 3, 35.0
"""Turns of a finalist; it runs for so long untimed, in which the clock settles, and for as long timed."""

SECONDS_AT_ONCE, SHARE_OF_TIME = 60.0, 0.02
"""What a run spends on measuring: a minute, enough for every product of a model at one batch size, and then so much of
its time. Batches of ever other lengths would else be measured for longer than their products gain."""

KEPT_BITS = 4
"""Sizes of one kind agree in so many leading bits: batches of many lengths are not measured one by one."""

MOST_PLANS = 4096
"""Shapes of which it is remembered what computes them; then all are looked up anew."""

Compute = Callable[[], object]


class NotNowError(Exception):
    """A CUDA graph is captured, or measuring has taken its share of the time."""


class MeasuredChoices:
    """What is known of one device, by kind, in `measured`."""

    def __init__(self, file: ChoiceFile) -> None:
        self.file = file
        self.measured = file.read()
        self._begin, self._spent = time.monotonic(), 0.0
        self._lock = threading.Lock()
        """Held while a choice is made: calls may come from a thread of autograd's."""

    def of_kind(self, kind: str, measure: Callable[[], Measured]) -> Measured:
        """What is known of `kind`, or what `measure` finds.

        Raises:
            NotNowError: nothing is known, and it cannot be found now.
        """
        if kind not in self.measured:
            if not self._may_measure():
                raise NotNowError
            begin = time.monotonic()
            found = measure()
            self._spent += time.monotonic() - begin
            self.measured[kind] = self.file.agree(kind, found)
        return self.measured[kind]

    def _may_measure(self) -> bool:
        now = time.monotonic()
        within = self._spent <= SECONDS_AT_ONCE + SHARE_OF_TIME * (now - self._begin)
        return within and not torch.cuda.is_current_stream_capturing()


def coarse(size: int) -> int:
    """`size`, rounded up to KEPT_BITS leading bits."""
    shift = max(size.bit_length() - KEPT_BITS, 0)
    return -(-size >> shift) << shift


def quickest_of(computes: Mapping[str | None, Compute]) -> Measured:
    """The quickest of all, if it beats the one named None by the margin; that one if not."""
    quick = medians(computes, QUICK_ROUNDS, dict.fromkeys(computes, QUICK_CALLS))
    final = finalists(quick)
    ms = medians(
        {text: computes[text] for text in final}, STEADY_ROUNDS, {text: steady_calls(quick[text]) for text in final}
    )
    quickest = min(ms, key=ms.__getitem__)
    chosen = quickest if ms[quickest] < (1 - MARGIN) * ms[None] else None
    return Measured(chosen, ms[None], ms[chosen])


def finalists(ms: Mapping[str | None, float]) -> list[str | None]:
    """The one named None, and the first few of all others."""
    others = sorted((text for text in ms if text is not None), key=ms.__getitem__)
    return [None, *others[:FINALISTS]]


def steady_calls(ms: float) -> int:
    return max(1, round(STEADY_MS / ms))


def medians(
    computes: Mapping[str | None, Compute], rounds: int, calls: Mapping[str | None, int]
) -> dict[str | None, float]:
    """ms of each, in `rounds` turns of `calls` untimed and as many timed. The device works through all of them without
    a pause: the host waits for it at their end alone."""
    laps: dict[str | None, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {text: [] for text in computes}
    for turn in range(rounds):
        for text in list(computes)[:: 1 if turn % 2 == 0 else -1]:
            _repeat(computes[text], calls[text])
            begin = _event()
            _repeat(computes[text], calls[text])
            laps[text].append((begin, _event()))
    torch.cuda.current_stream().synchronize()
    return {
        text: statistics.median(begin.elapsed_time(end) for begin, end in found) / calls[text]
        for text, found in laps.items()
    }


def _repeat(compute: Compute, times: int) -> None:
    for _ in range(times):
        compute()


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
