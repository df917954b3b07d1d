"""Whether torch's selective checkpointing is watching: it keeps results by the operator that gives them, and computes
the others a second time."""

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

SelectiveMode = _CachingTorchDispatchMode | _CachedTorchDispatchMode
"""Of the first pass, with its `policy_fn`; of the second, with the kept results in its `storage`."""


def selective_mode() -> SelectiveMode | None:
    """The outermost that is active, or None."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, SelectiveMode):
            return mode
    return None
