"""Where optimizers keep their state, behind one view: cells, and which elements of which parameters they hold.

A torch optimizer steps the parameters themselves, or, on replicas, parts of them (`parallel/parts.py`). DeepSpeed's
ZeRO-1 and 2, BF16_Optimizer and ZeRO-3 step flat fp32 tensors, each rank a part of what the data ranks hold together.
Nothing of that shows beyond this file.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from neox_hf.checkpoint.partitioned import forget_gathered, partition_of, partition_range
from neox_hf.errors import CheckpointError
from neox_hf.kernels.split_fp32 import join_fp32
from neox_hf.parallel.parts import ParameterPart

MASTER = "master"
Groups = tuple[tuple[dict[str, Any], tuple[nn.Parameter, ...]], ...]


@dataclass(frozen=True)
class Place:
    """Part of a parameter in a cell.

    start: its first element in this rank's parameter, flattened. at: its first element in the cell.
    weights: the same elements of the weights that the model computes with, flat; a view.
    """

    parameter: nn.Parameter
    start: int
    at: int
    weights: Tensor

    @property
    def numel(self) -> int:
        return self.weights.numel()


@dataclass(frozen=True)
class Cell:
    """A tensor that the optimizer steps, under which it keeps its state; `group` is its group of hyper-parameters.

    flat: the cell is a master copy, cut from one or more parameters; otherwise it is the one parameter itself, or its
        part.
    """

    key: Tensor
    group: dict[str, Any]
    places: tuple[Place, ...]
    flat: bool

    @property
    def whole(self) -> bool:
        """Whether it is a parameter itself, which every data rank steps; of others each holds elements of its own."""
        return self.key is self.places[0].parameter


@runtime_checkable
class PartOfMasters(Protocol):
    """An optimizer that keeps of its fp32 masters only what the parameters lack."""

    def master_of(self, parameter: Tensor) -> Tensor | None:
        """In fp32; None before the first step."""

    def take_master(self, parameter: Tensor, master: Tensor) -> None:
        """Have `master`, fp32 on any device, be the parameter's, and the parameter what it rounds to."""

    def whole_state(self, parameter: Tensor) -> dict[str, Any]:
        """The state as if masters were kept, these on `meta`, even those of parameters that lack all of them."""


@dataclass(frozen=True)
class Container:
    """An optimizer with its cells.

    optimizer: the innermost one, a torch optimizer. groups: hyper-parameters and the model's parameters under them.
    keeps_masters: cells are fp32 copies of weights in low precision. halves: of cells whose memory has been given back,
    the bf16 weights that they round to, and what these are short of them.
    publish: bring the cells' values into the weights. Every rank calls it.
    relink: tell the owner of the cells that their state has been replaced.
    """

    optimizer: Optimizer
    groups: Groups
    cells: tuple[Cell, ...]
    keeps_masters: bool = False
    halves: Mapping[Tensor, tuple[Tensor, Tensor]] | None = None
    publish: Callable[[], None] = field(default=lambda: None)
    relink: Callable[[], None] = field(default=lambda: None)

    @property
    def device(self) -> torch.device:
        """Where the model computes, wherever its state is kept."""
        return self.cells[0].places[0].parameter.device

    @property
    def makes_masters(self) -> bool:
        """Whether masters are made when they are asked for, by `master_of`; those in `state_of` are on `meta`."""
        return isinstance(self.optimizer, PartOfMasters)

    def state_of(self, cell: Cell) -> dict[str, Any]:
        """What the optimizer keeps for a cell; nothing before the first step."""
        if self.makes_masters:
            return self.optimizer.whole_state(cell.key)
        return self.optimizer.state.get(cell.key, {})

    def makes(self, slot: str) -> bool:
        """Whether no tensor holds this slot, and `make_master` makes what is asked of it."""
        return slot == MASTER and (self.makes_masters or self.halves is not None)

    def make_master(self, cell: Cell, first: int, numel: int) -> Tensor:
        """Consecutive elements of a cell's master, flat."""
        if self.halves is not None:
            return join_fp32(*(half.narrow(0, first, numel) for half in self.halves[cell.key]))
        return self.optimizer.master_of(cell.key).reshape(-1).narrow(0, first, numel)

    @property
    def kind(self) -> str:
        """The optimizer's name on disk, whatever contains it."""
        return ("Master" if self.keeps_masters else "") + type(self.optimizer).__name__


def container_of(optimizer: Any, data_rank: int) -> Container:
    """The view of an optimizer, which Accelerate or DeepSpeed may have wrapped.

    Raises:
        CheckpointError: it is of a kind that this file does not know.
    """
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if isinstance(optimizer, Optimizer):
        return _torch(optimizer)
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _zero_3(optimizer, data_rank)
    if hasattr(optimizer, "bit16_groups"):
        return _flat(optimizer, optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups)
    if hasattr(optimizer, "bf16_groups"):
        return _flat(optimizer, optimizer.bf16_groups, optimizer.fp32_groups_flat_partition)
    raise CheckpointError(
        f"the state of a {type(optimizer).__name__} cannot be saved; use a torch optimizer, alone or under ZeRO"
    )


def _torch(optimizer: Optimizer) -> Container:
    stepped = [(group, group["params"]) for group in optimizer.param_groups]
    cells = tuple(Cell(p, group, (_place_of(p),), flat=False) for group, ps in stepped for p in ps)
    groups = tuple((group, tuple(_place_of(p).parameter for p in ps)) for group, ps in stepped)

    @torch.no_grad()
    def publish() -> None:
        for parameter, state in optimizer.state.items():
            if MASTER in state:
                parameter.copy_(state[MASTER])

    return Container(optimizer, groups, cells, publish=publish)


def _place_of(stepped: nn.Parameter) -> Place:
    """Of a parameter, or a part of one."""
    elements = stepped.detach().reshape(-1)
    if isinstance(stepped, ParameterPart):
        return Place(stepped.whole, stepped.start, 0, elements)
    return Place(stepped, 0, 0, elements)


def _flat(zero: Any, parameters: list[list[nn.Parameter]], flats: list[Tensor]) -> Container:
    """ZeRO-1, ZeRO-2 and BF16_Optimizer: one flat tensor for each group."""
    inner = zero.optimizer
    groups = tuple((group, tuple(ps)) for group, ps in zip(inner.param_groups, parameters, strict=True))
    cells = tuple(
        Cell(flat, group, tuple(_place_in_flat(p) for p in ps), flat=True)
        for flat, (group, ps) in zip(flats, groups, strict=True)
    )

    def relink() -> None:
        # DeepSpeed keeps views into the moments, which it makes only once, and under ZeRO-1 and 2 too early.
        zero._hp_optimizer_states_linked = False
        if all(inner.state.get(flat) for flat in flats):
            zero._lazy_init_hp_params_optimizer_state()

    return Container(
        inner,
        groups,
        cells,
        keeps_masters=_low_precision(groups),
        halves=getattr(inner, "halves", None),
        publish=zero.update_lp_params,
        relink=relink,
    )


def _place_in_flat(parameter: nn.Parameter) -> Place:
    elements, mapping = parameter.detach().view(-1), parameter._hp_mapping
    if mapping is None:
        return Place(parameter, 0, 0, elements[:0])
    start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
    return Place(parameter, start, mapping.hp_fragment_address.start, elements.narrow(0, start, numel))


def _zero_3(zero: Any, data_rank: int) -> Container:
    """ZeRO-3: several flat tensors for each group, each of the partitions of some parameters."""
    inner = zero.optimizer
    of_group = [zero.sub_group_to_group_id[number] for number in range(len(zero.fp16_groups))]
    cells = tuple(
        Cell(flat, inner.param_groups[group], tuple(_places_of_partitions(parameters, data_rank)), flat=True)
        for flat, group, parameters in zip(zero.fp32_partitioned_groups_flat, of_group, zero.fp16_groups, strict=True)
    )
    groups = tuple(
        (settings, tuple(p for g, ps in zip(of_group, zero.fp16_groups, strict=True) if g == number for p in ps))
        for number, settings in enumerate(inner.param_groups)
    )

    @torch.no_grad()
    def publish() -> None:
        for cell in cells:
            for place in cell.places:
                place.weights.copy_(cell.key.narrow(0, place.at, place.numel))
                forget_gathered(place.parameter)

    return Container(inner, groups, cells, keeps_masters=_low_precision(groups), publish=publish)


def _places_of_partitions(parameters: list[nn.Parameter], data_rank: int) -> Iterator[Place]:
    at = 0
    for parameter in parameters:
        yield Place(parameter, partition_range(parameter, data_rank)[0], at, partition_of(parameter, data_rank))
        at += parameter.ds_tensor.ds_numel


def _low_precision(groups: Groups) -> bool:
    return any(p.dtype.itemsize < torch.float32.itemsize for _, members in groups for p in members)
