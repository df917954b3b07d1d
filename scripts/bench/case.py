"""What the benchmark knows of an op."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scripts.bench.floors import Shapes, Work
from scripts.bench.inputs import Inputs, Random


@dataclass(frozen=True)
class Case:
    """One row.

    make: its inputs. torch: plain torch, which in fp64 is the truth too. ours: takes `backend` as well.
    forward, both: work of the forward pass, and of forward and backward. targets: ms for the two, where any is owed;
    most_gib: what both may take beyond their inputs. compiled: what `torch.compile` is given, if not `torch`. liger:
    makes Liger's, where it has the op. timed: implementations; Liger's is not captured, for its losses ask the device
    for a number. checked: whether results can be held against the truth, unlike those of dropout and of eight bits.
    """

    name: str
    make: Callable[[Shapes, Random], Inputs]
    torch: Callable[..., Any]
    ours: Callable[..., Any]
    forward: Callable[[Shapes], Work]
    both: Callable[[Shapes], Work]
    targets: tuple[float | None, float | None] = (None, None)
    compiled: Callable[..., Any] | None = None
    liger: Callable[[], Callable[..., Any]] | None = None
    timed: tuple[str, ...] = ("ours", "torch", "liger", "compile")
    most_gib: float | None = None
    checked: bool = True


def streams(reads_and_writes: int) -> Callable[[Shapes], Work]:
    """Work that moves so many tensors [tokens, hidden]."""
    return lambda s: Work(moved=reads_and_writes * s.stream)


def wides(reads_and_writes: int) -> Callable[[Shapes], Work]:
    """Work that moves so many tensors [tokens, inner]."""
    return lambda s: Work(moved=reads_and_writes * s.wide)
