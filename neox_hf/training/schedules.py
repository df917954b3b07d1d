"""GPT-NeoX's learning-rate schedules. HF's own are chosen by `lr_scheduler_type` and need nothing from here.

With n steps done, W warm-up steps, N decay steps, peak rate P and floor m:

    n <= W        P * max(1, n) / W
    constant      P
    linear        P * (N - n) / (N - W)
    cosine        m + (P - m) * (1 + cos(pi * (n - W) / (N - W))) / 2
    exponential   P * exp(-0.693 * (n - W) / (N - W))

and past the warm-up never less than m. Past N the rate stays where it was at N. W may be fractional.

Source: EleutherAI/gpt-neox megatron/learning_rates.py.
"""

import math
from collections.abc import Callable

HALVING = 0.693


def _constant(progress: float, peak: float, floor: float) -> float:
    return peak


def _linear(progress: float, peak: float, floor: float) -> float:
    return peak * (1.0 - progress)


def _cosine(progress: float, peak: float, floor: float) -> float:
    return floor + 0.5 * (peak - floor) * (math.cos(math.pi * progress) + 1.0)


def _exponential(progress: float, peak: float, floor: float) -> float:
    return peak * math.exp(-HALVING * progress)


DECAY_STYLES: dict[str, Callable[[float, float, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "exponential": _exponential,
}


def learning_rate(step: int, *, style: str, peak: float, floor: float, warmup_steps: float, decay_steps: int) -> float:
    """Learning rate of the optimizer step after `step` steps have been done.

    Raises:
        ValueError: unknown style.
    """
    if style not in DECAY_STYLES:
        raise ValueError(f"lr_decay_style={style!r} is unknown; choose one of {sorted(DECAY_STYLES)}")
    if warmup_steps > 0 and step <= warmup_steps:
        return peak * max(1, step) / max(1.0, warmup_steps)
    decay = max(decay_steps - warmup_steps, 1e-9)
    progress = min(max((step - warmup_steps) / decay, 0.0), 1.0)
    return max(DECAY_STYLES[style](progress, peak, floor), floor)
