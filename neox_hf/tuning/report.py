"""What a tuning found, as text."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from neox_hf.kernels.choice_file import Measured
from neox_hf.tuning.search import Outcome, Tuning


def product_table(measured: Mapping[str, Measured], plain: str = "torch") -> str:
    """A line for each kind of product that was measured on this device: ms otherwise, which is `plain`, of the best,
    and who that is."""
    rows = [("product", f"{plain} ms", "best ms", "choice")]
    for kind, found in sorted(measured.items()):
        choice = plain if found.algorithm is None else found.algorithm.rstrip("0")
        rows.append((kind, f"{found.plain_ms:.4f}", f"{found.ms:.4f}", choice))
    return _aligned(rows)


def table(tuning: Tuning) -> str:
    """A line for each question: op, dtype and shape, ms of the default and of the best, and the choice. Below, what
    was refused, and what was not reached."""
    rows = [("op", "dtype", "shape", "default ms", "best ms", "choice"), *map(_row, tuning.outcomes)]
    lines = [_aligned(rows)]
    for outcome in tuning.outcomes:
        for launch, reason in outcome.refused.items():
            lines.append(f"refused: {outcome.question.key}: {in_words(launch)}: {reason}")
    if tuning.unreached:
        lines.append(f"no time was left for: {'; '.join(tuning.unreached)}. Give more --seconds")
    return "\n".join(lines)


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _row(outcome: Outcome) -> tuple[str, ...]:
    key, best, default = outcome.question.key, outcome.best, outcome.default
    choice = "default" if best == default else f"{in_words(best)} instead of {in_words(default)}"
    times = (f"{outcome.ms[launch]:.4f}" for launch in (default, best))
    return key.op, key.dtype, " x ".join(map(str, key.shape)) or "-", *times, choice


def in_words(launch: Any) -> str:
    """A launch by its fields: `rows 2, warps_in_flight 32`."""
    return ", ".join(f"{name} {value}" for name, value in asdict(launch).items())
