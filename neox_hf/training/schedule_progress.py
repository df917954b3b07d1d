"""What a checkpoint says of a learning-rate schedule, and how a run's own schedule takes it up.

Most schedules are a `LambdaLR`: a factor on a base rate, by steps. `reduce_lr_on_plateau` and `greedy` have no formula:
they change the optimizer's rate after evaluations, so that how far they have come is in that rate.
"""

import logging
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from transformers.optimization import GreedyLR

logger = logging.getLogger(__name__)

KIND = "kind"
"""Of a schedule's saved state: the class. Versions before 2026-12-01 have not written it."""

KNOWN = (LambdaLR, ReduceLROnPlateau, GreedyLR)
"""What `lr_scheduler_type` and `lr_decay_style` choose among; any other one is the user's own."""

FOLLOWS_EVALUATION = (ReduceLROnPlateau, GreedyLR)

PROGRESS_OF_FOLLOWERS = frozenset(
    {
        "_last_lr",
        "_streaming_avg",
        "best",
        "cooldown_counter",
        "last_epoch",
        "num_bad_epochs",
        "num_good_epochs",
        "reset_start",
        "warmup_counter",
    }
)
"""What evaluations have changed in them. All else are settings, and the recipe's."""

DERIVED = frozenset({KIND, "_init_lrs", "default_min_lr", "mode_worse"})
"""What follows from rates and settings that a change is told of by another name."""


def note_initial_rates(optimizer: torch.optim.Optimizer) -> None:
    """Have each group keep the rate it began with, where torch's schedules keep it; of those that have none, the rate
    it has now."""
    for group in optimizer.param_groups:
        if "lr" in group:
            group.setdefault("initial_lr", group["lr"])


def schedule_state(scheduler: LRScheduler | GreedyLR) -> dict[str, Any]:
    """What a checkpoint keeps of it, JSON."""
    return {KIND: kind_of(scheduler), **scheduler.state_dict()}


def kind_of(scheduler: LRScheduler | GreedyLR) -> str:
    """The name of its class, or of the one of `KNOWN` that it is made from."""
    return next((known for known in KNOWN if isinstance(scheduler, known)), type(scheduler)).__name__


def saved_kind(state: dict[str, Any]) -> str | None:
    """Of which kind the schedule was that this is the state of. None: a user's own one, of an older version."""
    if KIND in state:
        return state[KIND]
    if "lr_lambdas" in state:
        return LambdaLR.__name__
    if "num_bad_epochs" in state:
        return GreedyLR.__name__ if "_init_lrs" in state else ReduceLROnPlateau.__name__
    return None


def initial_rates(state: dict[str, Any], groups: list[dict[str, Any]]) -> list[float] | None:
    """What the schedule that `state` is of has made its rates from, by group; None: it does not say.

    groups: the optimizer's, as the checkpoint has them.
    """
    if KIND not in state and saved_kind(state) in [follower.__name__ for follower in FOLLOWS_EVALUATION]:
        return state.get("_init_lrs")  # nobody had noted them in groups
    return [group.get("initial_lr") for group in groups]


def fits(scheduler: LRScheduler | GreedyLR, state: dict[str, Any]) -> bool:
    """Whether it can go on with that state."""
    kind = saved_kind(state)
    return kind_of(scheduler) == kind or (kind is None and not isinstance(scheduler, KNOWN))


def load_progress(scheduler: LRScheduler | GreedyLR, state: dict[str, Any]) -> None:
    """Have it stand where the schedule stood that `state` is of. Settings of one that follows evaluations stay as the
    recipe has them; those of a user's own one are the checkpoint's, as in torch."""
    if not isinstance(scheduler, FOLLOWS_EVALUATION):
        scheduler.load_state_dict({key: value for key, value in state.items() if key != KIND})
        return
    for key, wanted in scheduler.state_dict().items():
        is_setting = key not in PROGRESS_OF_FOLLOWERS and key not in DERIVED
        if is_setting and key in state and state[key] != wanted:
            logger.warning("resumed with %s=%s of the schedule; the checkpoint had %s", key, wanted, state[key])
    scheduler.load_state_dict({key: value for key, value in state.items() if key in PROGRESS_OF_FOLLOWERS})


def set_base_rates(scheduler: LRScheduler | GreedyLR, base_rates: list[float]) -> None:
    """The rates that it goes on from, by group."""
    for name in ("base_lrs", "_init_lrs"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, list(base_rates))


def rates_at(scheduler: LRScheduler | GreedyLR, step: int, base_rates: list[float]) -> list[float]:
    """Have a new schedule stand where `step` steps are done; its rates there, by group. One that follows evaluations
    has seen none."""
    if isinstance(scheduler, FOLLOWS_EVALUATION):
        return list(base_rates)
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    if isinstance(scheduler, LambdaLR):
        return lambda_rates(scheduler, base_rates)
    closed_form = getattr(scheduler, "_get_closed_form_lr", None)  # of those of torch's that go on from the rate before
    return list(base_rates) if closed_form is None else closed_form()


def lambda_rates(scheduler: LambdaLR, base_rates: list[float]) -> list[float]:
    """Its rates where it stands, by group."""
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    return [base * factor for base, factor in zip(base_rates, factors, strict=True)]
