"""AdamW over fp32 master copies of low-precision weights."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from neox_hf.errors import RecipeError
from neox_hf.training.arguments import NeoXTrainingArguments

WITH_MASTER_WEIGHTS = ("adamw_torch_fused", "adamw_torch")
"""Values of `train.optim` that have a form with fp32 master weights."""


class MasterAdamW(torch.optim.Optimizer):
    """Decoupled-weight-decay Adam whose arithmetic, master weights and moments are fp32.

    Gradients may be fp32 (see `parallel.data_parallel.accumulate_gradients_in_fp32`) or of the parameter's dtype.
    `state[p]` holds `master`, `exp_avg`, `exp_avg_sq` (fp32, the parameter's shape) and `step` (fp32 scalar). A
    parameter whose gradient is None is left as it is, bit for bit.

    Source: Loshchilov and Hutter 2019, arXiv 1711.05101; the update itself is torch's.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        fused: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": fused})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        states = [self._state_of(p) for p in parameters]
        masters = [state["master"] for state in states]
        adamw(
            masters,
            [p.grad.float() for p in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=not group["fused"] and masters[0].is_cuda,
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        torch._foreach_copy_(parameters, masters)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["master"] = parameter.detach().float()
            state["exp_avg"] = torch.zeros_like(state["master"])
            state["exp_avg_sq"] = torch.zeros_like(state["master"])
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return state


def optimizer_class(
    args: NeoXTrainingArguments, stock: tuple[type[torch.optim.Optimizer], dict[str, Any]]
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The optimizer that `train.optim` and `train.precision` name together.

    Args:
        stock: HF's class and keyword arguments for `train.optim`.

    Raises:
        RecipeError: the precision keeps fp32 master weights, and this optimizer cannot.
    """
    if not args.keeps_master:
        return stock
    name, kwargs = str(args.optim.value), stock[1]
    if name not in WITH_MASTER_WEIGHTS:
        raise RecipeError(
            f"train.optim={name!r} has no fp32 master weights, which train.precision={args.precision!r} keeps; "
            f"use {' or '.join(WITH_MASTER_WEIGHTS)}, or train.precision=amp"
        )
    kept = {name: kwargs[name] for name in ("lr", "betas", "eps") if name in kwargs}
    return MasterAdamW, {**kept, "fused": bool(kwargs.get("fused"))}
