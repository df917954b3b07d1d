"""The optimizers of a recipe: AdamW over fp32 master copies of low-precision weights, and who takes which."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from neox_hf.checkpoint.optimizer_containers import MASTER
from neox_hf.errors import RecipeError
from neox_hf.kernels.split_fp32 import join_fp32, split_fp32
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.fused_adamw import REMAINDER, FusedAdamW
from neox_hf.training.optimizer_arguments import arguments_problem

FUSED = "adamw_torch_fused"
WITH_MASTER_WEIGHTS = (FUSED, "adamw_torch")
"""Values of `train.optim` that have a form with fp32 master weights."""


class MasterAdamW(FusedAdamW):
    """AdamW whose arithmetic, master weights and moments are fp32, over weights of any dtype.

    Gradients may be fp32 (see `parallel.data_parallel.accumulate_gradients_in_fp32`) or of the parameter's dtype. The
    weights are what the masters round to. `state[p]` holds `exp_avg`, `exp_avg_sq` (fp32, the parameter's shape) and
    `step` (fp32 scalar); of a bf16 parameter `remainder` (int16), what it is short of its master; of another `master`
    (fp32) itself.
    """

    keeps_masters = True

    def master_of(self, parameter: Tensor) -> Tensor | None:
        """In fp32; made anew where only a remainder is kept. None before the first step."""
        state = self.state.get(parameter, {})
        if REMAINDER in state:
            return join_fp32(parameter.detach(), state[REMAINDER])
        return state.get(MASTER)

    @torch.no_grad()
    def take_master(self, parameter: Tensor, master: Tensor) -> None:
        """Have `master`, fp32 on any device, be the parameter's master, and the parameter what it rounds to."""
        master = master.to(parameter.device, torch.float32)
        weight, kept = split_fp32(master) if _is_half_of_master(parameter) else (master, master.clone())
        parameter.copy_(weight)
        self.state[parameter][REMAINDER if _is_half_of_master(parameter) else MASTER] = kept

    def whole_state(self, parameter: Tensor) -> dict[str, Any]:
        """The parameter's state with a master on `meta` in place of a remainder."""
        state = dict(self.state.get(parameter, {}))
        if state.pop(REMAINDER, None) is not None or MASTER in state:
            state[MASTER] = torch.empty_like(parameter, dtype=torch.float32, device="meta")
        return state

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        weight = parameter.detach()
        if _is_half_of_master(parameter):
            return {REMAINDER: torch.zeros_like(weight, dtype=torch.int16), **super()._new_state(weight)}
        return {MASTER: weight.to(torch.float32, copy=True), **super()._new_state(weight)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch has cast all state to the parameters' dtype.
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(keys, parameters, strict=True):
            for slot, value in state_dict["state"].get(key, {}).items():
                self.state[parameter][slot] = value.to(parameter.device, copy=True)


def _is_half_of_master(parameter: Tensor) -> bool:
    """Whether its master is it and a remainder."""
    return parameter.dtype == torch.bfloat16


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
        RecipeError: the precision keeps fp32 master weights, and this optimizer cannot; or `train.optim_args` has
            something that it does not take.
    """
    name, kwargs = str(args.optim.value), _in_floats(stock[1])
    if problem := arguments_problem(name, args.optim_args):
        raise RecipeError(f"train.optim_args={args.optim_args!r} {problem}")
    if args.keeps_master and name not in WITH_MASTER_WEIGHTS:
        raise RecipeError(_without_masters(f"train.optim={name!r}", args))
    if not (args.keeps_master or name == FUSED):
        return stock[0], kwargs
    kept = {name: kwargs[name] for name in ("lr", "betas", "eps") if name in kwargs}
    ours = MasterAdamW if args.keeps_master else FusedAdamW
    return ours, {**kept, "fused": bool(kwargs.get("fused")), "kernels": kernels}


def check_keeps_masters(optimizer: object | None, args: NeoXTrainingArguments) -> None:
    """Make sure that an optimizer, whoever made it, has what `train.precision` keeps. None is yet to be made.

    Raises:
        RecipeError: the precision keeps fp32 master weights, and this optimizer does not.
    """
    if optimizer is not None and args.keeps_master and not getattr(optimizer, "keeps_masters", False):
        made = type(optimizer)
        raise RecipeError(_without_masters(f"the optimizer {made.__module__}.{made.__qualname__}", args))


def _without_masters(optimizer: str, args: NeoXTrainingArguments) -> str:
    return (
        f"{optimizer} has no fp32 master weights, which train.precision={args.precision!r} keeps; use train.optim="
        f"{' or '.join(WITH_MASTER_WEIGHTS)} and give no other, or train.precision=amp"
    )


def _in_floats(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A recipe may have whole numbers, which torch's AdamW does not take for betas."""
    numbers = {name: float(kwargs[name]) for name in ("lr", "eps") if isinstance(kwargs.get(name), int)}
    betas = {"betas": tuple(float(beta) for beta in kwargs["betas"])} if "betas" in kwargs else {}
    return {**kwargs, **numbers, **betas}
