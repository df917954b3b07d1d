"""On resume the recipe decides the hyper-parameters; the checkpoint decides how far the schedule has come."""

import logging
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

logger = logging.getLogger(__name__)


class RecipeHyperparameters:
    """Hyper-parameters of a new optimizer and schedule, to be put back after a checkpoint was loaded into them.

    A run that is resumed with another `train.learning_rate` continues with that one, and says so.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> None:
        self.optimizer = optimizer
        self.scheduler = scheduler
        self._groups = [_without_parameters(group) for group in optimizer.param_groups]
        self._base_rates = list(getattr(scheduler, "base_lrs", []))

    def apply(self) -> None:
        """Put them back, with the learning rate where the schedule now stands."""
        for group, wanted in zip(self.optimizer.param_groups, self._groups, strict=True):
            for key, value in wanted.items():
                if key == "lr":
                    continue
                if group.get(key) != value:
                    logger.warning("resumed with %s=%s; the checkpoint had %s", key, value, group.get(key))
                group[key] = value
        # Every schedule of HF's and ours that runs without evaluation is a LambdaLR: a factor on a base rate.
        if isinstance(self.scheduler, LambdaLR):
            self.scheduler.base_lrs = self._base_rates
            self._set_rates()

    def _set_rates(self) -> None:
        factors = [factor(self.scheduler.last_epoch) for factor in self.scheduler.lr_lambdas]
        rates = [base * factor for base, factor in zip(self._base_rates, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.scheduler._last_lr = rates


def _without_parameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
