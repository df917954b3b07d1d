"""Whether a module's parameters may be read instead of calling it, so that one op can do what two modules would."""

from torch import nn


def is_watched(module: nn.Module) -> bool:
    """Whether a hook is to be called when the module is."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(hooks) or hasattr(module, "_hf_hook")


def is_bare(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether reading the parameters of a module of one of `kinds` is the same as calling it.

    It is not when an adapter has replaced it, when a hook watches it, or when accelerate's offloading brings its
    weights to the device only as it is called.
    """
    return type(module) in kinds and not is_watched(module)
