"""Scales of all tensors that a model rounds to eight bits, found from what they were in steps before.

    scale = 2^(floor(log2(largest / m)) - margin),  m = the largest magnitude of the last `history` steps

The scale must be known when the kernel that makes the values writes them, so it comes from earlier steps ("delayed
scaling"); one more reading of the tensor, which a scale of its own values would take, is a third of a cast's time.
Powers of two make scaling exact and cost no accuracy, floats being as accurate at one power as at another. So there is
room for steps unlike those before (`MARGINS`): magnitudes may exceed the past's 2^margin to 2^(margin + 1) times before
they are clamped; the next step knows of them.

In the step that first uses a slot, nothing is known: there, each tensor is read twice, and scaled by its own values.

Everything lives in a few vectors on the device, one element a slot, so that `advance`, once an optimizer step, is a
dozen launches for the whole model, without a word to the host; kernels are given views. When they may be captured in a
CUDA graph, `capturable` says. Source of the recipe: arXiv 2209.05433, section 3.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neox_hf.kernels.fp8_format import E4M3, E5M2, largest

ALIGNED = 4
"""Elements of fp32 from one inverse to the next: cuBLASLt refuses those that do not lie at a multiple of 16 bytes."""

MARGINS = {E4M3: 2, E5M2: 6}
"""Powers of two left above the past's magnitudes. Steps differ in their gradients by far more than in activations: one
at which the loss jumped had Pythia-1.4B's at 16 times the usual, and clamped they led elsewhere. What room takes from
the lower end of e5m2 nobody misses: numbers down to 2^-23 of the past's largest keep all their bits, in e4m3 down to
2^-12."""

LARGEST_EXPONENT = 100
"""Scales stay within 2^-100 and 2^100, whose inverses are floats too."""


def scale_for(magnitude: Tensor, limit: Tensor | float, margin: Tensor | int = 0) -> Tensor:
    """The power of two that brings `magnitude` to at most limit / 2^margin; 1 for zero and what is not finite."""
    known = magnitude.isfinite() & (magnitude > 0)
    ratio = limit / torch.where(known, magnitude, 1.0)
    exponent = torch.frexp(ratio.clamp(max=2.0**LARGEST_EXPONENT)).exponent - 1 - margin
    power = (exponent.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT) + 127) << 23
    return torch.where(known, power.to(torch.int32).view(torch.float32), 1.0)


@dataclass(eq=False)
class ScaleSlot:
    """One tensor's place in the table, at `index`. scale, inverse, amax: views [1] of it.

    since: the first epoch it was used in.
    """

    table: "Fp8Scales"
    index: int
    dtype: torch.dtype
    scale: Tensor
    inverse: Tensor
    amax: Tensor
    since: int | None = None

    def knows(self) -> bool:
        """Whether earlier steps tell the scale; else this step's tensors are to be scaled by their own values."""
        if self.since is None:
            self.since = self.table.epoch
        return self.since < self.table.epoch

    def for_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and inverse [1] for x: the slot's own, or x's if nothing is known yet."""
        if self.knows() or x.numel() == 0:
            return self.scale, self.inverse
        least, most = torch.aminmax(x.detach())
        scale = scale_for(torch.maximum(-least, most).float().view(1), largest(self.dtype))
        return scale, 1.0 / scale


class Fp8Scales:
    """The table. dtypes: the eight-bit format of each slot, by name. margins: by format.

    Who owns it calls `advance` after each optimizer step, with what takes the maximum over all ranks that hold the same
    layers: then their scales agree, and any rank's `state_dict` is everyone's.
    """

    def __init__(
        self,
        dtypes: Mapping[str, torch.dtype],
        device: torch.device | str,
        *,
        history: int = 16,
        margins: Mapping[torch.dtype, int] = MARGINS,
    ) -> None:
        self.epoch = 0
        self.plans: dict[Any, Any] = {}  # what launches over many slots remember
        count = len(dtypes)
        self.limits = torch.tensor([largest(dtype) for dtype in dtypes.values()], dtype=torch.float32, device=device)
        self.margins = torch.tensor([margins[dtype] for dtype in dtypes.values()], dtype=torch.int32, device=device)
        self.history = torch.zeros(history, count, device=device)
        self.scale = torch.ones(count, device=device)
        self.inverse = torch.ones(count, ALIGNED, device=device)[:, 0]
        self.amax = torch.zeros(count, device=device)
        self.slots = {name: self._slot(index, dtype) for index, (name, dtype) in enumerate(dtypes.items())}

    def _slot(self, index: int, dtype: torch.dtype) -> ScaleSlot:
        scale, inverse, amax = (each[index : index + 1] for each in (self.scale, self.inverse, self.amax))
        return ScaleSlot(self, index, dtype, scale, inverse, amax)

    @property
    def capturable(self) -> bool:
        """Whether all that was cast so far is scaled by what steps before have shown.

        Then kernels read scales from memory that stays where it is, and a step may be captured in a CUDA graph, or such
        a graph replayed. Weights are made outside of it (`Fp8Weight.refresh`), and `advance` is called there.
        """
        used = [slot.since for slot in self.slots.values() if slot.since is not None]
        return bool(used) and max(used) < self.epoch

    @torch.no_grad()
    def advance(self, reduce: Callable[[Tensor], object] | None = None) -> None:
        """Take this step's magnitudes into the history and make the next step's scales. No backward pass may be due.

        reduce: makes the vector it is given its maximum over ranks, in place.
        """
        if reduce is not None:
            reduce(self.amax)
        self.history.copy_(self.history.roll(1, 0))
        self.history[0] = self.amax
        self.amax.zero_()
        self._make_scales()
        self.epoch += 1

    def _make_scales(self) -> None:
        most = self.history.amax(0)
        scale = scale_for(most, self.limits, self.margins)
        # A tensor of zeros says nothing.
        self.scale.copy_(torch.where(most > 0, scale, self.scale))
        self.inverse.copy_(1.0 / self.scale)

    def recalibrate(self) -> None:
        """Forget the scales, as after other weights were loaded: the next step scales tensors by their own values."""
        self.history.zero_()
        for slot in self.slots.values():
            slot.since = None

    def state_dict(self) -> dict[str, Tensor]:
        """Each slot's history [history], fp32, by name, on the host: scales follow from it."""
        history = self.history.t().to("cpu", copy=True)
        return {name: history[index].clone() for index, name in enumerate(self.slots)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`, on any device. A slot that is not in `state` starts afresh; others' are ignored.

        Raises:
            ValueError: the histories are of another length.
        """
        self.recalibrate()
        for index, (name, slot) in enumerate(self.slots.items()):
            if name not in state:
                continue
            kept = state[name]
            if kept.shape != self.history.shape[:1]:
                raise ValueError(
                    f"fp8 scales of {name} were saved over {kept.numel()} steps, but this run keeps "
                    f"{self.history.shape[0]}; resume with the history that wrote them"
                )
            self.history[:, index] = kept.to(self.history.device)
            if bool((kept > 0).any()):
                slot.since = self.epoch
        self.amax.zero_()
        self._make_scales()
        self.epoch += 1
