"""torch's AdamW whose step is one kernel over all parameters of a group, clipping and skipping included."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    gradient_square_sum,
)
from neox_hf.parallel.parts import ReplicaParts, pieces_of

PIECE_ELEMENTS = 2**26
"""Of what is stepped while the piece before it travels: some 0.5 ms on an H200."""

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
    parts: what this one of several replicas steps, and gathers the others' of (`parallel/parts.py`); None: everything.
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
    parts: ReplicaParts | None = None
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
        self._make_tables()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._make_tables()

    def _make_tables(self) -> None:
        self._norm_tables = TensorTables()
        # By the first of what is stepped at once: pieces may look alike, and would take each other's place.
        self._tables: dict[Tensor, TensorTables] = defaultdict(TensorTables)

    def step_in_parts(self, parts: ReplicaParts) -> None:
        """Before the first step: each group's parameters become this replica's parts of them."""
        assert not self.state, "some of this state would be of no part"
        for group in self.param_groups:
            group["params"] = [parts.of(parameter) for parameter in group["params"]]
        self.parts = parts

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        arrivals = []
        for group in self.param_groups:
            for piece in self._pieces(group):
                self._step_piece(group, piece)
                if self.parts is not None:
                    arrivals.append(self.parts.start_gather(piece))
        for arrival in arrivals:
            arrival.wait()
        return loss

    @torch.no_grad()
    def clip_in_step(self, max_norm: float) -> Tensor | None:
        """The norm of all gradients, to which the next step clips: they are read once for it and never written.

        A norm that is not finite makes that step change nothing. None where no kernel takes the step, unless it is of
        parts, whose norm no one else can know: then nothing has been prepared.
        """
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        fused = all(group["fused"] is not False for group in self.param_groups)
        if not parameters:
            return None
        if self.parts is None and not (fused and ADAMW.has_kernel_for(self.kernels, parameters[0].grad)):
            return None
        norm = self._norm(parameters)
        self.gradient_factor = clip_coefficient(norm, max_norm)
        self.skip = ~norm.isfinite()
        return norm

    def forget_clipping(self) -> None:
        """Have gradients count for what they are, whatever `clip_in_step` has prepared: a run that does not clip never
        calls it, and would go on with what is left."""
        self.gradient_factor = self.skip = None

    def _norm(self, parameters: list[Tensor]) -> Tensor:
        parts = self.parts
        counted = [p.grad for p in parameters if parts is None or parts.counts(p)]
        square = gradient_square_sum(counted, tables=self._norm_tables, backend=self.kernels)
        return (square if parts is None else parts.sum(square.to(parameters[0].device))).sqrt()

    def _pieces(self, group: dict[str, Any]) -> Iterator[list[Tensor]]:
        """What is stepped at once: everything; of parts so much that it travels while the next piece is stepped."""
        parameters = [p for p in group["params"] if p.grad is not None]
        return pieces_of(parameters, math.inf if self.parts is None else PIECE_ELEMENTS)

    def _step_piece(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        adamw_(
            self._tensors(parameters),
            AdamWRates(group["lr"], beta1, beta2, group["eps"], group["weight_decay"]),
            factor=self.gradient_factor,
            skip=self.skip,
            zero_gradients=self.zeroes_gradients,
            tables=self._tables[parameters[0]],
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
