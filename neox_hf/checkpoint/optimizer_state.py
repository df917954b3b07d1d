"""The state of any torch-like optimizer, keyed by Hugging Face names instead of positions.

A *slot* is a tensor that the optimizer keeps per parameter (`exp_avg`, `momentum_buffer`, `master`, ...): a list of
boxes, one file per slot. Everything else it keeps per parameter (the step, in one optimizer a float and in another a
tensor without dimensions), and the hyper-parameters of its groups, is JSON.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neox_hf.checkpoint.boxes import Box, BoxReader, check_boxes, fill_boxes
from neox_hf.checkpoint.directory import STATE
from neox_hf.checkpoint.plain_values import decode_value, dtype_name, encode_value
from neox_hf.checkpoint.writer import CheckpointWriter
from neox_hf.errors import CheckpointError

SCALARS = f"{STATE}/optimizer.json"
Names = dict[nn.Parameter, str]

# How a step is carried out belongs to the machine that runs now, not to the one that saved.
IMPLEMENTATION = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})


@dataclass(frozen=True)
class OptimizerBoxes:
    """slots: boxes by slot name. scalars: JSON-ready; optimizer class, groups and parameters by name."""

    slots: dict[str, list[Box]] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)


class OptimizerReader(Protocol):
    """What `load_optimizer` reads from; a `Checkpoint` is one."""

    def json(self, relative: str) -> Any:
        """Content of a JSON file."""

    def boxes(self, stem: str) -> BoxReader:
        """The boxes that all ranks wrote under `stem`."""


def slot_stem(slot: str) -> str:
    """The stem of the files of one slot."""
    return f"optimizer.{slot}"


def write_optimizer(writer: CheckpointWriter, optimizer: Optimizer, names: Names) -> None:
    """Write the optimizer's state. Every rank holds all of it: the parameters are dealt round robin to the ranks."""
    saved = optimizer_boxes(optimizer, names)
    for slot, boxes in saved.slots.items():
        writer.write_boxes(slot_stem(slot), boxes[writer.rank :: writer.world_size])
    if writer.rank == 0:
        writer.write_json(SCALARS, saved.scalars)


def optimizer_boxes(optimizer: Optimizer, names: Names) -> OptimizerBoxes:
    """The optimizer's state; the boxes refer to its tensors and copy nothing.

    Raises:
        CheckpointError: a parameter has no name, or the state holds something that is neither tensor nor plain value.
    """
    named = _named_parameters(optimizer, names)
    strangers = [key for key in optimizer.state if key not in set(named.values())]
    if strangers:
        raise CheckpointError(f"the optimizer keeps state for {strangers[0]!r}, which is no parameter of its groups")
    slots: dict[str, list[Box]] = {}
    parameters: dict[str, Any] = {}
    for name, parameter in named.items():
        entry: dict[str, Any] = {"shape": list(parameter.shape), "slots": {}, "scalars": {}}
        for key, value in optimizer.state.get(parameter, {}).items():
            if _is_slot(key, value, parameter):
                slots.setdefault(_file_safe(key), []).append(Box.whole(name, value))
                entry["slots"][key] = {"shape": list(value.shape), "dtype": dtype_name(value.dtype)}
            else:
                entry["scalars"][key] = encode_value(value, f"state {key!r} of {name}")
        parameters[name] = entry
    return OptimizerBoxes(
        slots,
        {
            "optimizer": type(optimizer).__name__,
            "slots": sorted(slots),
            "groups": [_encode_group(group, names) for group in optimizer.param_groups],
            "parameters": parameters,
        },
    )


def load_optimizer(optimizer: Optimizer, names: Names, reader: OptimizerReader) -> None:
    """Give the optimizer the saved state bit for bit, or change nothing. No step needs to have been taken.

    Tensors that the optimizer already keeps are filled in place, others are made on the parameter's device. Group
    hyper-parameters are restored too, except those that choose an implementation (`fused`, `foreach`, ...).

    Raises:
        CheckpointError: optimizer class, groups, parameter names, shapes, slots or dtypes differ.
    """
    saved = reader.json(SCALARS)
    named = _named_parameters(optimizer, names)
    _check_class(optimizer, saved)
    _check_groups(optimizer, names, saved)
    _check_parameters(named, saved)
    devices = _scalar_devices(optimizer, names)
    states = {
        name: _new_state(optimizer.state.get(parameter, {}), parameter, name, saved, devices[name])
        for name, parameter in named.items()
    }
    wanted = {slot: [] for slot in saved["slots"]}
    for name, state in states.items():
        for slot in saved["parameters"][name]["slots"]:
            wanted[slot].append(Box.whole(name, state[slot]))
    readers = {slot: reader.boxes(slot_stem(slot)) for slot in wanted}
    for slot, boxes in wanted.items():
        check_boxes(boxes, readers[slot])

    for slot, boxes in wanted.items():
        fill_boxes(boxes, readers[slot])
    for name, parameter in named.items():
        if states[name]:
            optimizer.state[parameter] = states[name]
        else:
            optimizer.state.pop(parameter, None)
    for group, entry in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update({key: decode_value(value) for key, value in entry["hyper"].items()})


def _named_parameters(optimizer: Optimizer, names: Names) -> dict[str, nn.Parameter]:
    named: dict[str, nn.Parameter] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter not in names:
                raise CheckpointError(
                    f"a parameter of shape {tuple(parameter.shape)} in optimizer group {number} belongs to no "
                    "module of the model; build the optimizer from the model's own parameters"
                )
            named[names[parameter]] = parameter
    return named


def _is_slot(key: str, value: Any, parameter: nn.Parameter) -> bool:
    """A tensor with elements of its own; a step counter is none, even where the parameter has no dimensions either."""
    return isinstance(value, Tensor) and (value.ndim > 0 or (parameter.ndim == 0 and key != "step"))


def _file_safe(slot: str) -> str:
    if not re.fullmatch(r"\w+", slot):
        raise CheckpointError(f"the optimizer's slot {slot!r} cannot be part of a file name; use letters, digits and _")
    return slot


def _encode_group(group: dict[str, Any], names: Names) -> dict[str, Any]:
    hyper = {
        key: encode_value(value, f"group setting {key!r}") for key, value in group.items() if key not in IMPLEMENTATION
    }
    return {"names": sorted(names[parameter] for parameter in group["params"]), "hyper": hyper}


def _check_class(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    if saved["optimizer"] != type(optimizer).__name__:
        raise CheckpointError(
            f"the checkpoint's optimizer is {saved['optimizer']}, this run's is {type(optimizer).__name__}; "
            "resume with the train.optim and train.precision that wrote it"
        )


def _check_groups(optimizer: Optimizer, names: Names, saved: dict[str, Any]) -> None:
    found = [set(group["names"]) for group in saved["groups"]]
    wanted = [{names[parameter] for parameter in group["params"]} for group in optimizer.param_groups]
    if len(found) != len(wanted):
        raise CheckpointError(f"the checkpoint's optimizer has {len(found)} groups, this run's has {len(wanted)}")
    for number, (theirs, ours) in enumerate(zip(found, wanted, strict=True)):
        if theirs != ours:
            raise CheckpointError(
                f"optimizer group {number} differs: only in the checkpoint {sorted(theirs - ours)[:5]}, "
                f"only in this run {sorted(ours - theirs)[:5]}"
            )


def _check_parameters(named: dict[str, nn.Parameter], saved: dict[str, Any]) -> None:
    for name, parameter in named.items():
        shape = tuple(saved["parameters"][name]["shape"])
        if shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{name} has shape {shape} in the checkpoint's optimizer and {tuple(parameter.shape)} in this run"
            )


def _new_state(
    current: dict[str, Any], parameter: nn.Parameter, name: str, saved: dict[str, Any], scalar_device: torch.device
) -> dict[str, Any]:
    """The parameter's future state: its current tensors where it has them, empty ones elsewhere, and the scalars."""
    entry = saved["parameters"][name]
    lost = {key for key, value in current.items() if _is_slot(key, value, parameter)} - set(entry["slots"])
    if lost:
        raise CheckpointError(f"the checkpoint's optimizer lacks {sorted(lost)} of {name}, which this run's keeps")
    state: dict[str, Any] = {}
    for slot, like in entry["slots"].items():
        held = current.get(slot)
        if held is None:
            held = torch.empty(like["shape"], dtype=getattr(torch, like["dtype"]), device=parameter.device)
        state[slot] = held
    state.update({key: decode_value(value, scalar_device) for key, value in entry["scalars"].items()})
    return state


def _scalar_devices(optimizer: Optimizer, names: Names) -> dict[str, torch.device]:
    """Where torch keeps a step that is a tensor: beside the parameter if kernels read it, else on the host."""
    return {
        names[parameter]: parameter.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
