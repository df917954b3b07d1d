"""Tensors that no one keeps for the backward pass: it computes them again, and what needs them waits until then.

A norm's output, or an activation's, is read by the linears behind it and kept for the gradient of their weights. The
norm's own backward pass reads all that it takes to make that output again, in the same pass over memory, but it runs
after theirs. So a linear that reads such an output keeps nothing of it and leaves the product that is its weight's
gradient to whoever makes the output again.

The op that makes it marks its output; `linear` looks for the mark.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ATTRIBUTE = "late_tensor"

Use = Callable[[Tensor], None]


class LateTensor:
    """One output of one forward pass, which its op's backward pass will make again."""

    def __init__(self) -> None:
        self._uses: list[Use] = []

    @property
    def is_awaited(self) -> bool:
        return bool(self._uses)

    def when_there(self, use: Use) -> None:
        """`use` the output when it has been made again."""
        self._uses.append(use)

    def arrive(self, output: Tensor) -> None:
        """Here it is; each use runs once."""
        uses, self._uses = self._uses, []
        for use in uses:
            use(output)


def late_tensors(count: int, x: Tensor) -> tuple[LateTensor, ...]:
    """For the outputs of an op on x whose backward pass is sure to run; none where it is not, or a compiler traces."""
    if torch.compiler.is_compiling() or not (x.requires_grad and torch.is_grad_enabled()):
        return ()
    return tuple(LateTensor() for _ in range(count))


def mark(output: Tensor, late: LateTensor) -> Tensor:
    """`output`, with the word that `late` stands for it. Only what has a gradient is sure to be made again."""
    assert output.requires_grad, "nothing runs its op's backward pass"
    setattr(output, ATTRIBUTE, late)
    return output


def late_form(x: Tensor) -> LateTensor | None:
    """What stands for x in the backward pass, if x will be made again."""
    return getattr(x, ATTRIBUTE, None)
