"""Launches of kernels as data: what an op chooses for a shape, what else it could choose, and what was tuned.

An op names its choice once, as a `LaunchChoice`, and asks it at every launch. On a CUDA device the answer is what
`python -m neox_hf.tune` has found there (`launch_file.py`), else the default, which is a function of the shape alone.
Off CUDA, in Triton's interpreter too, it is the default. No kernel tunes itself while it runs; products of matrices,
which are cuBLAS's, are another matter (`product_choice.py`).
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from neox_hf.kernels.launch_file import LaunchKey, dtype_name, launch_path, read_launches

logger = logging.getLogger(__name__)

Launch = TypeVar("Launch")
"""What may be chosen: a frozen dataclass of integers, as a file can hold it."""


@dataclass(frozen=True, eq=False)
class LaunchChoice(Generic[Launch]):
    """One op's launches.

    op: its name in files. candidates: what may be chosen for a shape, the default first. A shape is the few integers
    that the choice may depend on: columns, or heads and their size; never the number of tokens, so that one tuning
    serves all batch sizes.
    """

    op: str
    candidates: Callable[..., tuple[Launch, ...]]

    def default(self, *shape: int) -> Launch:
        return self.candidates(*shape)[0]

    def chosen(self, device: torch.device, dtype: torch.dtype, *shape: int) -> Launch:
        """The launch on `device` of a kernel that reads `dtype`."""
        launches = launches_on(device)
        # A launch comes thousands of times a step: all but the first time this is one look into a dict, whose keys are
        # equal to the named tuple that is made the first time.
        answer = launches.answers.get((self, dtype, shape))
        return launches.of(Question(self, dtype, shape)) if answer is None else answer


def for_every_shape(*candidates: Launch) -> Callable[..., tuple[Launch, ...]]:
    """Candidates that are the same whatever the shape."""
    return lambda *shape: candidates


class Question(NamedTuple):
    """What an op asks before a launch, on a device that is known."""

    choice: LaunchChoice[Any]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def key(self) -> LaunchKey:
        """Its name in a file."""
        return LaunchKey(self.choice.op, dtype_name(self.dtype), self.shape)

    @property
    def candidates(self) -> tuple[Any, ...]:
        return self.choice.candidates(*self.shape)


class DeviceLaunches:
    """The launches of one device, found out once for each question.

    tuned: what a file says, by key. answers: what has been found out.
    """

    def __init__(self, tuned: Mapping[LaunchKey, Mapping[str, int]]) -> None:
        self._tuned = tuned
        self.answers: dict[Question, Any] = {}

    def of(self, question: Question) -> Any:
        if question not in self.answers:
            self.answers[question] = self._look_up(question)
        return self.answers[question]

    def _look_up(self, question: Question) -> Any:
        tuned, candidates = self._tuned.get(question.key), question.candidates
        if tuned is None:
            return candidates[0]
        for candidate in candidates:
            if dataclasses.asdict(candidate) == tuned:
                return candidate
        logger.info("%s: the tuned launch %s is no candidate any more; the default holds", question.key, dict(tuned))
        return candidates[0]

    def asked_by(self, call: Callable[[], object]) -> list[Question]:
        """What the launches of `call` ask, in order. For the tuner: so it times what a run will look up."""
        before, self.answers = self.answers, {}
        try:
            call()
            return list(self.answers)
        finally:
            self.answers = before

    @contextmanager
    def trying(self, question: Question, launch: Any) -> Iterator[None]:
        """Let `launch` be the answer meanwhile, in all threads: the backward pass has one of its own."""
        before = self.of(question)
        self.answers[question] = launch
        try:
            yield
        finally:
            self.answers[question] = before


@functools.cache
def launches_on(device: torch.device) -> DeviceLaunches:
    """The launches of `device`; on CUDA those of its file, which is read now. `cache_clear()` forgets all."""
    if device.type != "cuda":
        return DeviceLaunches({})
    return DeviceLaunches(read_launches(launch_path(torch.cuda.get_device_name(device))))
