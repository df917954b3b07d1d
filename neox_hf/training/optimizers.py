"""The optimizers of a recipe: AdamW over fp32 master copies of low-precision weights, and who takes which."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from neox_hf.errors import RecipeError
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.fused_adamw import FusedAdamW

FUSED = "adamw_torch_fused"
WITH_MASTER_WEIGHTS = (FUSED, "adamw_torch")
"""Values of `train.optim` that have a form with fp32 master weights."""


class MasterAdamW(FusedAdamW):
    """AdamW whose arithmetic, master weights and moments are fp32, over weights of any dtype.

    Gradients may be fp32 (see `parallel.data_parallel.accumulate_gradients_in_fp32`) or of the parameter's dtype.
    `state[p]` holds `master`, `exp_avg`, `exp_avg_sq` (fp32, the parameter's shape) and `step` (fp32 scalar). The
    weights are what the masters round to.
    """

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        master = parameter.detach().to(torch.float32, copy=True)
        return {"master": master, **super()._new_state(master)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch has cast all state to the parameters' dtype.
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(keys, parameters, strict=True):
            for slot, value in state_dict["state"].get(key, {}).items():
                self.state[parameter][slot] = value.to(parameter.device, copy=True)


def optimizer_class(
    args: NeoXTrainingArguments,
    stock: tuple[type[torch.optim.Optimizer], dict[str, Any]],
    kernels: str = "auto",
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The optimizer that `train.optim` and `train.precision` name together.

    Args:
        stock: HF's class and keyword arguments for `train.optim`.
        kernels: `auto | triton | torch`, who computes the step of `adamw_torch_fused`.

    Raises:
        RecipeError: the precision keeps fp32 master weights, and this optimizer cannot.
    """
    name, kwargs = str(args.optim.value), stock[1]
    if args.keeps_master and name not in WITH_MASTER_WEIGHTS:
        raise RecipeError(
            f"train.optim={name!r} has no fp32 master weights, which train.precision={args.precision!r} keeps; "
            f"use {' or '.join(WITH_MASTER_WEIGHTS)}, or train.precision=amp"
        )
    if not (args.keeps_master or name == FUSED):
        return stock
    kept = {name: kwargs[name] for name in ("lr", "betas", "eps") if name in kwargs}
    ours = MasterAdamW if args.keeps_master else FusedAdamW
    return ours, {**kept, "fused": bool(kwargs.get("fused")), "kernels": kernels}
