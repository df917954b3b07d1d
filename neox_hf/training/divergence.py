"""What happens when a loss or a gradient stops being finite.

The gradient norm is the one number that every rank shares and that a NaN or Inf anywhere must reach, so it alone is
watched. Reading it from the device each step would stall the host; under `raise` it is therefore read one step late,
which is early enough: nothing is saved in between without a look.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from neox_hf.errors import DivergenceError


class GradientGuard:
    """Watches the gradient norm of each step.

    Args:
        policy: `raise` stops the run; `skip` drops the step.
        max_skipped: consecutive skipped steps after which `skip` stops the run too.
    """

    def __init__(self, policy: str, max_skipped: int) -> None:
        self.policy = policy
        self.max_skipped = max_skipped
        self.skipped_steps = 0
        self._consecutive = 0
        self._unread: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def state_dict(self) -> dict[str, int]:
        """What a run that goes on has to know: steps skipped in all, and in a row."""
        return {"skipped_steps": self.skipped_steps, "consecutive": self._consecutive}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.skipped_steps, self._consecutive = state["skipped_steps"], state["consecutive"]

    def must_skip(self, step: int, norm: Tensor | float) -> bool:
        """Look at the norm of `step` (counted from 1); True if its update must be dropped.

        Raises:
            DivergenceError: the policy is to stop, or too many steps in a row were skipped.
        """
        if self.policy == "raise":
            self.settle()
            self._unread = _start_reading(step, norm)
            return False
        if math.isfinite(float(norm)):
            self._consecutive = 0
            return False
        self.skipped_steps += 1
        self._consecutive += 1
        if self._consecutive >= self.max_skipped:
            raise DivergenceError(
                f"step {step}: the gradient norm is {float(norm)}, which makes {self._consecutive} in a row "
                f"(train.max_skipped_steps={self.max_skipped}); lower train.learning_rate or look at the data"
            )
        return True

    def settle(self) -> None:
        """Judge the norm that is still unread, if any. Called before anything is saved.

        Raises:
            DivergenceError: it is not finite.
        """
        if self._unread is None:
            return
        (step, norm, ready), self._unread = self._unread, None
        if ready is not None:
            ready.synchronize()
        if not math.isfinite(float(norm)):
            raise DivergenceError(
                f"step {step}: the gradient norm is {float(norm)}; the last checkpoint is unharmed. Lower "
                "train.learning_rate, look at the data, or set train.nan_policy=skip"
            )


def _start_reading(step: int, norm: Tensor | float) -> tuple[int, Tensor, torch.cuda.Event | None]:
    norm = torch.as_tensor(norm).detach()
    if not norm.is_cuda:
        return step, norm.clone(), None
    host = torch.empty((), dtype=norm.dtype, pin_memory=True)
    host.copy_(norm, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return step, host, ready
