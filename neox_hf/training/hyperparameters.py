"""On resume the recipe decides the hyper-parameters; the checkpoint decides how far the schedule has come."""

import logging
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from neox_hf.training.schedule_progress import (
    fits,
    initial_rates,
    kind_of,
    lambda_rates,
    load_progress,
    note_initial_rates,
    rates_at,
    saved_kind,
    set_base_rates,
)

logger = logging.getLogger(__name__)


class RecipeHyperparameters:
    """Hyper-parameters of a new optimizer and schedule, to be put back after a checkpoint was loaded into the
    optimizer.

    A run that is resumed with another `train.learning_rate` continues with that one, and says so.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> None:
        note_initial_rates(optimizer)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self._groups = [_without_parameters(group) for group in optimizer.param_groups]
        self._base_rates = [group.get("initial_lr") for group in optimizer.param_groups]

    def apply(self, state: dict[str, Any], step: int) -> None:
        """Put them back, with the learning rate where the schedule now stands.

        Args:
            state: what the checkpoint keeps of its schedule; one of another kind says nothing to this run's, which
                then stands where its own formula has it.
            step: steps that the checkpoint's run had done.
        """
        groups = self.optimizer.param_groups
        reached = [group.get("lr") for group in groups]
        initial = initial_rates(state, groups)
        self._put_back_all_but_rates()
        if fits(self.scheduler, state):
            load_progress(self.scheduler, state)
            rates = self._rates_of_same_kind(reached, initial)
        else:
            rates = rates_at(self.scheduler, step, self._base_rates)
            message = "resumed with the schedule %s; the checkpoint had %s: from step %d on the learning rate is %s"
            logger.warning(message, kind_of(self.scheduler), saved_kind(state) or "another", step, _told(rates))
        set_base_rates(self.scheduler, self._base_rates)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        self.scheduler._last_lr = rates

    def _put_back_all_but_rates(self) -> None:
        for group, wanted in zip(self.optimizer.param_groups, self._groups, strict=True):
            for key, value in wanted.items():
                if key == "lr":
                    continue
                if group.get(key) != value:
                    logger.warning("resumed with %s=%s; the checkpoint had %s", key, value, group.get(key))
                group[key] = value

    def _rates_of_same_kind(self, reached: list[float], initial: list[float] | None) -> list[float]:
        """reached: rates of the checkpoint. initial: what its schedule has made them from; None is unknown."""
        if isinstance(self.scheduler, LambdaLR):
            return lambda_rates(self.scheduler, self._base_rates)
        if initial is not None:
            return [_carried_over(*rates) for rates in zip(reached, initial, self._base_rates, strict=True)]
        if reached != self._base_rates:
            message = (
                "resumed with the checkpoint's learning rate %s and not with train.learning_rate=%s: a checkpoint of "
                "this age does not say what it was reduced from"
            )
            logger.warning(message, _told(reached), _told(self._base_rates))
        return reached


def _carried_over(reached: float, initial: float, base: float) -> float:
    """What `base` has come to where `initial` has come to `reached`."""
    if initial == base:
        return reached  # bit for bit
    return base * (reached / initial) if initial else base


def _told(rates: list[float]) -> str:
    return ", ".join(f"{float(rate):g}" for rate in dict.fromkeys(rates))


def _without_parameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
