"""Which candidate wins: the search itself, whoever keeps the time."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from neox_hf.errors import RecipeError
from neox_hf.kernels.language import LAUNCH_ERRORS
from neox_hf.kernels.launch_choice import DeviceLaunches, Question
from neox_hf.kernels.launch_file import LaunchKey, TunedLaunch
from neox_hf.tuning.agreement import disagreement
from neox_hf.tuning.work import Call, Work

MARGIN = 0.02
"""By how much a candidate must be quicker than the default: less, and chance would choose."""

ROUNDS = 7
"""Times that each candidate is timed, in turns, since clocks drift. The median counts."""


class Clock(Protocol):
    """Who prepares calls and tells milliseconds: `DeviceClock`, which says more."""

    def first_call(self, work: Work) -> Call: ...

    def calls(self, work: Work) -> list[Call]: ...

    def ms(self, calls: Sequence[Call]) -> float: ...


@dataclass(frozen=True)
class Outcome:
    """What was found for one question. ms: medians of the candidates timed, the default first. refused: why others
    were not timed: their results differ, or they cannot be launched."""

    question: Question
    ms: dict[Any, float]
    refused: dict[Any, str] = field(default_factory=dict)

    @property
    def default(self) -> Any:
        return next(iter(self.ms))

    @property
    def best(self) -> Any:
        """The quickest launch, or the default, unless that is beaten by more than the margin."""
        quickest = min(self.ms, key=self.ms.__getitem__)
        return quickest if self.ms[quickest] < (1 - MARGIN) * self.ms[self.default] else self.default


@dataclass(frozen=True)
class Tuning:
    """Outcomes, and the names of the work that no time was left for."""

    outcomes: list[Outcome]
    unreached: list[str]

    def merged_into(self, entries: Iterable[TunedLaunch]) -> list[TunedLaunch]:
        """Entries of a file with what was found here. Where the default was best there is none: it may get better."""
        known: dict[LaunchKey, TunedLaunch] = {entry.key: entry for entry in entries}
        for outcome in self.outcomes:
            key, best = outcome.question.key, outcome.best
            known.pop(key, None)
            if best != outcome.default:
                known[key] = TunedLaunch(*key, asdict(best), outcome.ms[outcome.default], outcome.ms[best])
        return list(known.values())


def search(
    work: Sequence[Work],
    launches: DeviceLaunches,
    clock: Clock,
    seconds: float,
    now: Callable[[], float] = time.monotonic,
) -> Tuning:
    """Time the candidates of all that `work` launches, each question once, until about `seconds` have passed.

    Raises:
        RecipeError: the inputs do not fit into the device's memory.
    """
    end, outcomes, unreached = now() + seconds, {}, []
    for each in work:
        if now() > end:
            unreached.append(each.name)
            continue
        try:
            calls = clock.calls(each)
            for question in launches.asked_by(calls[0]):
                if question not in outcomes:
                    outcomes[question] = _outcome(question, each, calls, launches, clock, lambda: now() > end)
        except torch.OutOfMemoryError as error:
            raise RecipeError(
                f"tuning by {each.name} takes more memory than the device has free; give a smaller --micro-batch. "
                f"{error}"
            ) from error
    return Tuning(list(outcomes.values()), unreached)


def _outcome(
    question: Question,
    work: Work,
    calls: list[Call],
    launches: DeviceLaunches,
    clock: Clock,
    is_late: Callable[[], bool],
) -> Outcome:
    default, *others = question.candidates
    with launches.trying(question, default):
        wanted = clock.first_call(work)()
    sound, refused = [default], {}
    for candidate in others:
        if is_late():
            break
        objection = _objection(question, candidate, work, launches, clock, wanted)
        if objection is None:
            sound.append(candidate)
        else:
            refused[candidate] = objection
    return Outcome(question, _medians(question, sound, calls, launches, clock), refused)


def _objection(
    question: Question,
    candidate: Any,
    work: Work,
    launches: DeviceLaunches,
    clock: Clock,
    wanted: tuple[torch.Tensor, ...],
) -> str | None:
    """Why `candidate` may not win: it cannot be launched, or its results are not the default's; None if it may."""
    call = clock.first_call(work)
    try:
        with launches.trying(question, candidate):
            found = call()
    except LAUNCH_ERRORS as error:
        return f"cannot be launched: {error}"
    return disagreement(found, wanted)


def _medians(
    question: Question, candidates: list[Any], calls: list[Call], launches: DeviceLaunches, clock: Clock
) -> dict[Any, float]:
    """ms of each candidate, the default first; with nothing to compare it with, it is timed all the same."""
    times: dict[Any, list[float]] = {candidate: [] for candidate in candidates}
    for turn in range(ROUNDS):
        for candidate in candidates if turn % 2 == 0 else reversed(candidates):
            with launches.trying(question, candidate):
                times[candidate].append(clock.ms(calls))
    return {candidate: statistics.median(found) for candidate, found in times.items()}
