"""A backward pass that cannot be differentiated again."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable as _guarded


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As torch's, which also switches gradients off and on: 5 us of the host's time where they are off anyway.

    They are on only in a backward pass that is itself to be differentiated (`create_graph=True`). Then what is made
    here cannot be, even where the gradient that came is a constant, such as a loss's, and torch would think it could.
    """
    guarded = _guarded(backward)

    @wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        if not torch.compiler.is_compiling():
            gradients = tuple(None if each is None else each.detach().requires_grad_() for each in gradients)
        return guarded(ctx, *gradients)

    return run
