"""torch's AdamW whose step is one kernel over all parameters of a group, clipping and skipping included."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from neox_hf.checkpoint.optimizer_containers import MASTER
from neox_hf.kernels import (
    ADAMW,
    AdamWRates,
    AdamWTensors,
    TensorTables,
    adamw_,
    clip_coefficient,
    gradient_norm,
)

REMAINDER = "remainder"
"""Of a state: what a bf16 weight is short of its fp32 master (`kernels/split_fp32.py`)."""


class AdamW(torch.optim.AdamW):
    """Decoupled-weight-decay Adam over weights that are their own master; moments have their dtype.

    It is called as torch's class is, for a checkpoint keeps an optimizer's name and state and not who computed them:
    groups and `state[p]` (`exp_avg`, `exp_avg_sq`, `step`) are torch's. A parameter whose gradient is None is left as
    it is, bit for bit.

    gradient_factor: what all gradients count for, an fp32 scalar on the device; None is 1. Clipping sets it.
    skip: a scalar on the device; where it is not 0, a step changes nothing. None: never.
    zeroes_gradients: each step leaves zeros in the gradients, in the same pass over memory.
    halves: of every parameter, which itself is not there, the bf16 weights that it rounds to, and what these are short
        of it (`kernels/split_fp32.py`); None: the parameters are there.
    keeps_masters: of a class, whether its states have a master of each parameter, whole or in part, and fp32 moments.

    Args:
        lr: a tensor on the device is read there, as a CUDA graph needs it.
        fused: False is torch's update even where there is a kernel.
        kernels: `auto | triton | torch`, who computes the step.

    Source: Loshchilov and Hutter 2019, arXiv 1711.05101.
    """

    gradient_factor: Tensor | None = None
    skip: Tensor | None = None
    zeroes_gradients: bool = False
    halves: Mapping[Tensor, tuple[Tensor, Tensor]] | None = None
    kernels: str = "auto"
    keeps_masters: bool = False

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        fused: bool = True,
        kernels: str = "auto",
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, fused=fused)
        self._step_supports_amp_scaling = False  # torch's would take `grad_scale` and `found_inf` from a GradScaler
        self.kernels = kernels
        self._tables, self._norm_tables = TensorTables(), TensorTables()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tables, self._norm_tables = TensorTables(), TensorTables()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    @torch.no_grad()
    def clip_in_step(self, max_norm: float) -> Tensor | None:
        """The norm of all gradients, to which the next step clips: they are read once for it and never written.

        A norm that is not finite makes that step change nothing. None where no kernel takes the step: then nothing has
        been prepared.
        """
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        fused = all(group["fused"] is not False for group in self.param_groups)
        if not gradients or not fused or not ADAMW.has_kernel_for(self.kernels, gradients[0]):
            return None
        norm = gradient_norm(gradients, tables=self._norm_tables, backend=self.kernels)
        self.gradient_factor = clip_coefficient(norm, max_norm)
        self.skip = ~norm.isfinite()
        return norm

    def _step_group(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        beta1, beta2 = group["betas"]
        adamw_(
            self._tensors(parameters),
            AdamWRates(group["lr"], beta1, beta2, group["eps"], group["weight_decay"]),
            factor=self.gradient_factor,
            skip=self.skip,
            zero_gradients=self.zeroes_gradients,
            tables=self._tables,
            backend=self.kernels if group["fused"] is not False else "torch",
        )

    def _tensors(self, parameters: list[Tensor]) -> AdamWTensors:
        states = [self._state_of(p) for p in parameters]
        weights, masters = parameters, None
        if self.halves is not None:
            weights, masters = map(list, zip(*[self.halves[p] for p in parameters], strict=True))
        elif self.keeps_masters:
            masters = [state.get(REMAINDER, state.get(MASTER)) for state in states]
        return AdamWTensors(
            weights=weights,
            gradients=[p.grad for p in parameters],
            masters=masters,
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            steps=[state["step"] for state in states],
        )

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state.update(self._new_state(parameter))
        if state["step"].device != parameter.device:  # where torch's unfused form keeps it
            state["step"] = state["step"].to(parameter.device)
        return state

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        dtype = torch.float32 if self.keeps_masters else parameter.dtype
        return {
            "exp_avg": torch.zeros_like(parameter, dtype=dtype),
            "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype),
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        }


FusedAdamW = AdamW
"""The same, where torch's is spoken of too."""
