"""What is JSON of an optimizer's state: its class, its groups, and the scalars and slots of each parameter, by names.

Pipeline stages hold different parameters; their documents are merged into one that describes the whole model.
"""

from typing import Any

import torch
from torch import Tensor, nn

from neox_hf.checkpoint.directory import STATE
from neox_hf.checkpoint.optimizer_containers import MASTER, Cell, Container
from neox_hf.checkpoint.partitioned import whole_shape
from neox_hf.checkpoint.plain_values import dtype_name, encode_value
from neox_hf.errors import CheckpointError
from neox_hf.parallel.shards import Shard

SCALARS = f"{STATE}/optimizer.json"
Names = dict[nn.Parameter, str]
Shards = dict[nn.Parameter, Shard]
Document = dict[str, Any]

IMPLEMENTATION = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
"""How a step is carried out belongs to the machine that runs now, not to the one that saved."""


def slot_stem(slot: str) -> str:
    """The stem of the files of one slot."""
    return f"optimizer.{slot}"


def is_slot(key: str, value: Any, cell: Cell) -> bool:
    """A tensor with elements of its own; a step counter is none, even where the parameter has no dimensions either."""
    return isinstance(value, Tensor) and (value.ndim > 0 or (cell.key.ndim == 0 and key != "step"))


def slots_of(container: Container, cell: Cell) -> dict[str, Tensor]:
    """The tensors of a cell that go to disk, by slot; none before the first step. Masters may be on `meta`."""
    state = container.state_of(cell)
    slots = {key: value for key, value in state.items() if is_slot(key, value, cell)}
    if slots and cell.flat and container.keeps_masters:
        slots = {MASTER: cell.key.detach(), **slots}
    return slots


def describe(container: Container, names: Names, shards: Shards) -> Document:
    """The document of what this rank holds.

    Raises:
        CheckpointError: a parameter has no name, or the state holds something that is neither tensor nor plain value.
    """
    _check_named(container, names)
    parameters: dict[str, Any] = {}
    for cell in container.cells:
        slots = slots_of(container, cell)
        state = container.state_of(cell)
        scalars = {key: value for key, value in state.items() if not is_slot(key, value, cell)}
        for place in cell.places:
            name = names[place.parameter]
            whole = _shape_on_disk(place.parameter, shards)
            parameters[name] = {
                "shape": whole,
                "slots": {
                    slot: {
                        "shape": whole if value.shape == cell.key.shape else list(value.shape),
                        "dtype": dtype_name(value.dtype),
                    }
                    for slot, value in slots.items()
                },
                "scalars": {key: encode_value(value, f"state {key!r} of {name}") for key, value in scalars.items()},
            }
    return {
        "optimizer": container.kind,
        "slots": sorted({slot for entry in parameters.values() for slot in entry["slots"]}),
        "groups": [
            {"names": sorted(names[p] for p in members), "hyper": _hyper(settings)}
            for settings, members in container.groups
        ],
        "parameters": parameters,
    }


def merge(documents: list[Document]) -> Document:
    """One document for the whole model, from those of its pipeline stages in their order.

    A stage without a parameter for some group lacks that group, so groups are matched by what they say, in order.
    """
    whole = {**documents[0], "groups": [], "parameters": {}}
    for document in documents:
        position = 0
        for group in document["groups"]:
            later = range(position, len(whole["groups"]))
            match = next((at for at in later if whole["groups"][at]["hyper"] == group["hyper"]), None)
            if match is None:
                match = position if position < len(whole["groups"]) else len(whole["groups"])
                whole["groups"].insert(match, {"names": [], "hyper": group["hyper"]})
            merged = whole["groups"][match]
            merged["names"] = sorted({*merged["names"], *group["names"]})
            position = match + 1
        whole["parameters"] = {**document["parameters"], **whole["parameters"]}
    whole["slots"] = sorted({slot for document in documents for slot in document["slots"]})
    return whole


def check_alike(saved: Document, ours: Document) -> None:
    """Make sure that a saved document fits this run's.

    Raises:
        CheckpointError: class, parameters, shapes or the division into groups differ.
    """
    if saved["optimizer"] != ours["optimizer"]:
        raise CheckpointError(
            f"the checkpoint's optimizer is {saved['optimizer']}, this run's is {ours['optimizer']}; "
            "resume with the train.optim and train.precision that wrote it"
        )
    theirs, mine = saved["parameters"].keys(), ours["parameters"].keys()
    if theirs != mine:
        raise CheckpointError(
            f"the optimizers' parameters differ: only in the checkpoint {sorted(theirs - mine)[:5]}, "
            f"only in this run {sorted(mine - theirs)[:5]}"
        )
    for name, entry in ours["parameters"].items():
        found = tuple(saved["parameters"][name]["shape"])
        if found != tuple(entry["shape"]):
            raise CheckpointError(
                f"{name} has shape {found} in the checkpoint's optimizer and {tuple(entry['shape'])} in this run"
            )
    for one, other, whose in ((saved, ours, "this run"), (ours, saved, "the checkpoint")):
        _check_division(one, other, whose)


def _check_division(coarse: Document, fine: Document, whose: str) -> None:
    """No group of `coarse` may hold parameters of which `fine` treats some in one way and some in another."""
    group_of = {name: number for number, group in enumerate(fine["groups"]) for name in group["names"]}
    for group in coarse["groups"]:
        for name in group["names"][1:]:
            one, other = (fine["groups"][group_of[n]]["hyper"] for n in (group["names"][0], name))
            if one != other:
                raise CheckpointError(
                    f"{group['names'][0]} and {name} are in optimizer groups with different settings in {whose} only; "
                    "resume with the train.weight_decay and model that wrote the checkpoint"
                )


def _check_named(container: Container, names: Names) -> None:
    for number, (_, members) in enumerate(container.groups):
        for parameter in members:
            if parameter not in names:
                raise CheckpointError(
                    f"a parameter of shape {whole_shape(parameter)} in optimizer group {number} belongs to no "
                    "module of the model; build the optimizer from the model's own parameters"
                )
    known = {cell.key for cell in container.cells}
    strangers = [key for key in container.optimizer.state if key not in known]
    if strangers:
        raise CheckpointError(f"the optimizer keeps state for {strangers[0]!r}, which is no parameter of its groups")


def _shape_on_disk(parameter: nn.Parameter, shards: Shards) -> list[int]:
    return list(shards[parameter].shape if parameter in shards else whole_shape(parameter))


def _hyper(group: dict[str, Any]) -> dict[str, Any]:
    return {
        key: encode_value(value, f"group setting {key!r}")
        for key, value in group.items()
        if key not in IMPLEMENTATION and not key.startswith("_ds_")
    }


def scalar_device(cell: Cell) -> torch.device:
    """Where torch keeps a step that is a tensor: beside the parameter if kernels read it, else on the host."""
    on_device = cell.group.get("fused") or cell.group.get("capturable")
    return cell.key.device if on_device else torch.device("cpu")
