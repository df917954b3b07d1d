"""Functions as ops of torch, named `neox_hf::...`, which compilers and the policies of checkpointing see whole.

They are not `triton_op`s: into those a tracer would look, where it has nothing to fuse and may find the interpreter.
Nor are they `torch.library.custom_op`s, which ask the same of a function but go through several layers of Python at
each call, 35 to 100 us of the host's time; here it is one.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.autograd.graph import increment_version

from neox_hf.kernels.devices import is_elsewhere

LIBRARY = torch.library.Library("neox_hf", "FRAGMENT")
"""What registrations live in: they end with it."""


def register(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], OpOverload]:
    """Make an op `neox_hf::name` of the function below.

    The function takes a tensor first, whose device its kernels run on, and has type hints and no default values. It
    returns new tensors only, and writes into those of its arguments alone that `mutates` names. No gradient flows
    through the op: an autograd function around it calls it.
    """

    def make_op(function: Callable[..., Any]) -> OpOverload:
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, _implementation(function, mutates), "CompositeExplicitAutograd")
        return getattr(torch.ops.neox_hf, name).default

    return make_op


def register_fake(op: OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The function below says what `op` returns, by shape and dtype alone."""
    return torch.library.register_fake(op, lib=LIBRARY)


def _implementation(function: Callable[..., Any], mutates: Sequence[str]) -> Callable[..., Any]:
    """`function` on the device of its first argument; autograd is told that arguments have changed, which their version
    counters do."""
    names = list(inspect.signature(function).parameters)
    changed = [names.index(name) for name in mutates]

    def run(*arguments: Any) -> Any:
        if is_elsewhere(arguments[0]):
            with torch.cuda.device_of(arguments[0]):
                results = function(*arguments)
        else:
            results = function(*arguments)
        for place in changed:
            if arguments[place] is not None:
                increment_version(arguments[place])
        return results

    return run
