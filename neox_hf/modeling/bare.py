"""Whether a module's parameters may be read instead of calling it, so that one op can do what two modules would."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

REQUIRES_GRAD = "make_inputs_require_grads"
"""transformers' and PEFT's hook that an embedding has under checkpointing: its output is to need a gradient."""


def is_watched(module: nn.Module) -> bool:
    """Whether a hook is to be called when the module is, or a forward pass that was put on it alone."""
    hooks = (module._forward_pre_hooks, module._backward_pre_hooks, module._backward_hooks)
    called = any(_does_something(hook, module) for hook in module._forward_hooks.values())
    return any(hooks) or called or hasattr(module, "_hf_hook") or "forward" in vars(module) or _has_any_global_hook()


def _does_something(hook: Callable[..., Any], module: nn.Module) -> bool:
    """Not where an output is asked to need a gradient, and does so already."""
    is_trained = isinstance(module, nn.Embedding) and module.weight.requires_grad
    return not (is_trained and getattr(hook, "__name__", None) == REQUIRES_GRAD)


def is_bare(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether reading the parameters of a module of one of `kinds` is the same as calling it.

    It is not when an adapter has replaced it, when a hook watches it, or when accelerate's offloading brings its
    weights to the device only as it is called. A class may say by `computes_as` which of ours it is in another's name.
    """
    kind = type(module)
    return getattr(kind, "computes_as", kind) in kinds and not is_watched(module)
