"""The state of an optimizer back from disk: each rank reads what it holds, whatever layout and container wrote it."""

from typing import Any, Protocol

import torch
from torch import Tensor

from neox_hf.checkpoint.boxes import Box, BoxReader, check_boxes, fill_boxes
from neox_hf.checkpoint.exchange import Exchange
from neox_hf.checkpoint.optimizer_containers import MASTER, Cell, Container, Place, container_of
from neox_hf.checkpoint.optimizer_document import (
    SCALARS,
    Document,
    Names,
    Shards,
    check_alike,
    describe,
    is_slot,
    merge,
    scalar_device,
    slot_stem,
)
from neox_hf.checkpoint.optimizer_pieces import Piece
from neox_hf.checkpoint.plain_values import decode_value
from neox_hf.errors import CheckpointError
from neox_hf.parallel.collectives import together
from neox_hf.parallel.topology import Topology


class OptimizerReader(Protocol):
    """What `load_optimizer` reads from; a `Checkpoint` is one."""

    def json(self, relative: str) -> Any:
        """Content of a JSON file."""

    def boxes(self, stem: str) -> BoxReader:
        """The boxes that all ranks wrote under `stem`."""


def load_optimizer(
    optimizer: Any,
    names: Names,
    shards: Shards,
    reader: OptimizerReader,
    topology: Topology | None = None,
) -> None:
    """Give the optimizer the saved state bit for bit (but see `kernels/split_fp32.py` for one master in 131,072 that
    another kind of optimizer saved), or change nothing. Every rank calls it, after the weights are in place; no step
    needs to have been taken.

    Each rank reads what it holds, whatever layout wrote it. Tensors that the optimizer already keeps are filled in
    place, others are made beside the parameter. Group hyper-parameters are restored too, except those that choose an
    implementation (`fused`, `foreach`, ...). Where masters are restored, the weights become what the masters round to;
    where none were saved, masters become the weights.

    Raises:
        CheckpointError: on every rank, when class, groups, parameters, shapes, slots or dtypes differ on any.
    """
    topology = topology or Topology.single()
    container = container_of(optimizer, topology.data_rank)
    mine = together(topology, lambda: describe(container, names, shards))
    stages = Exchange(topology, "pipeline", container.device).gather_objects(mine)
    plan = together(topology, lambda: _Plan(container, names, shards, reader, merge(stages)))
    together(topology, plan.carry_out)
    container.relink()
    if plan.restores_masters:
        container.publish()


class _Plan:
    """What loading will do, checked against the checkpoint and not yet done."""

    def __init__(
        self, container: Container, names: Names, shards: Shards, reader: OptimizerReader, ours: Document
    ) -> None:
        self._container, self._names, self._shards = container, names, shards
        self._saved: Document = reader.json(SCALARS)
        check_alike(self._saved, ours)
        self._readers = {slot: reader.boxes(slot_stem(slot)) for slot in self._saved["slots"]}
        self.restores_masters = MASTER in self._saved["slots"]
        self._states: list[tuple[Cell, dict[str, Any]]] = []
        self._boxes: dict[str, list[Box]] = {}
        self._made_masters: list[tuple[Piece, Tensor]] = []
        for cell in container.cells:
            self._plan_cell(cell)
        for slot, boxes in self._boxes.items():
            check_boxes(boxes, self._readers[slot])
        for piece, like in self._made_masters:
            check_boxes(piece.boxes(like), self._readers[MASTER])

    @torch.no_grad()
    def carry_out(self) -> None:
        """Read and fill everything."""
        for cell, state in self._states:
            self._prepare_flat(cell, state)
        for slot, boxes in self._boxes.items():
            fill_boxes(boxes, self._readers[slot])
        optimizer = self._container.optimizer
        for cell, state in self._states:
            if state:
                optimizer.state[cell.key] = state
            else:
                optimizer.state.pop(cell.key, None)
        for piece, like in self._made_masters:  # one after the other: no two are in memory
            master = torch.zeros_like(like, device="cpu")
            fill_boxes(piece.boxes(master), self._readers[MASTER])
            optimizer.take_master(piece.cell.key, master)
        self._restore_groups()

    def _prepare_flat(self, cell: Cell, state: dict[str, Any]) -> None:
        """Elements that nothing is read into: padding and parameters without moments are 0, masters are the weights."""
        if not cell.flat:
            return
        for key, value in state.items():
            if is_slot(key, value, cell):
                value.zero_()
        for place in cell.places:
            cell.key.narrow(0, place.at, place.numel).copy_(place.weights)

    def _plan_cell(self, cell: Cell) -> None:
        entries = [self._saved["parameters"][self._names[place.parameter]] for place in cell.places]
        current = self._container.state_of(cell)
        state: dict[str, Any] = {}
        for entry in entries:
            for slot, like in entry["slots"].items():
                if slot not in state and not (cell.flat and slot == MASTER):
                    held = current.get(slot)
                    state[slot] = self._new_slot(cell, slot, like) if held is None else held
        self._check_nothing_is_lost(cell, current, state)
        for place, entry in zip(cell.places, entries, strict=True):
            for slot in entry["slots"]:
                self._plan_slot(slot, cell, place, state.get(slot, cell.key))
        if self._container.makes_masters:
            state.pop(MASTER, None)
        if state or not cell.flat:
            state.update(self._scalars(cell, entries))
        self._states.append((cell, state))

    def _new_slot(self, cell: Cell, slot: str, like: dict[str, Any]) -> Tensor:
        shape = like["shape"]
        on_disk = self._saved["parameters"][self._names[cell.places[0].parameter]]["shape"]
        if cell.flat or shape == on_disk:
            shape = cell.key.shape
        device = "meta" if slot == MASTER and self._container.makes_masters else cell.key.device
        return torch.zeros(shape, dtype=getattr(torch, like["dtype"]), device=device)  # which padding stays

    def _plan_slot(self, slot: str, cell: Cell, place: Place, value: Tensor) -> None:
        piece = Piece(self._names[place.parameter], self._shards.get(place.parameter), cell, place)
        if value.is_meta:
            self._made_masters.append((piece, value))
        else:
            self._boxes.setdefault(slot, []).extend(piece.boxes(value))

    def _check_nothing_is_lost(self, cell: Cell, current: dict[str, Any], state: dict[str, Any]) -> None:
        lost = {key for key, value in current.items() if is_slot(key, value, cell)} - set(state)
        if lost:
            name = self._names[cell.places[0].parameter]
            raise CheckpointError(f"the checkpoint's optimizer lacks {sorted(lost)} of {name}, which this run's keeps")

    def _scalars(self, cell: Cell, entries: list[dict[str, Any]]) -> dict[str, Any]:
        found = [entry["scalars"] for entry in entries if entry["scalars"]]
        if any(scalars != found[0] for scalars in found):
            first = self._names[cell.places[0].parameter]
            raise CheckpointError(
                f"the parameters in the optimizer group of {first} have taken different numbers of steps, which ZeRO "
                "cannot continue; resume with parallel.zero_stage=0"
            )
        values = found[0] if found else {}
        return {key: decode_value(value, scalar_device(cell)) for key, value in values.items()}

    def _restore_groups(self) -> None:
        hyper_of = {name: group["hyper"] for group in self._saved["groups"] for name in group["names"]}
        for settings, members in self._container.groups:
            if members:
                hyper = hyper_of[self._names[members[0]]]
                settings.update({key: decode_value(value) for key, value in hyper.items()})
