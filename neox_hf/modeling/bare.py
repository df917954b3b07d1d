"""Whether a module's parameters may be read instead of calling it, so that one op can do what two modules would."""

from torch import nn


def is_watched(module: nn.Module) -> bool:
    """Whether a hook is to be called when the module is, or a forward pass that was put on it alone."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(hooks) or hasattr(module, "_hf_hook") or "forward" in vars(module)


def is_bare(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether reading the parameters of a module of one of `kinds` is the same as calling it.

    It is not when an adapter has replaced it, when a hook watches it, or when accelerate's offloading brings its
    weights to the device only as it is called. A class may say by `computes_as` which of ours it is in another's name.
    """
    kind = type(module)
    return getattr(kind, "computes_as", kind) in kinds and not is_watched(module)
