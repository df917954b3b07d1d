"""The state of an optimizer on its way to disk: one format, whatever contains it and however it is laid out.

A *slot* is a tensor that the optimizer keeps per parameter (`exp_avg`, `momentum_buffer`, `master`, ...): boxes under
Hugging Face names, one file per slot and rank. Everything else is JSON (`optimizer_document`).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from neox_hf.checkpoint.boxes import Box
from neox_hf.checkpoint.exchange import Exchange
from neox_hf.checkpoint.fragments import whole_box
from neox_hf.checkpoint.optimizer_containers import Cell, Container, Place, container_of
from neox_hf.checkpoint.optimizer_document import SCALARS, Names, Shards, describe, merge, slot_stem, slots_of
from neox_hf.checkpoint.partitioned import whole_shape
from neox_hf.checkpoint.writer import CheckpointWriter
from neox_hf.errors import CheckpointError
from neox_hf.parallel.shards import Shard
from neox_hf.parallel.topology import Topology


def write_optimizer(
    writer: CheckpointWriter,
    optimizer: Any,
    names: Names,
    shards: Shards | None = None,
    topology: Topology | None = None,
) -> None:
    """Write the optimizer's state. Every rank calls it.

    Each tensor is put together inside its data group, on the rank that holds most of it (round robin where all hold
    the same), and written there as one box. A tensor that several stages or tensor ranks hold is written once.

    Args:
        optimizer: a torch optimizer, or DeepSpeed's, possibly wrapped by Accelerate.
        names, shards: of the model's parameters, from `hf_names` and `parallel.shards.shards_of`.
        topology: by default every rank of the writer's world is a replica.

    Raises:
        CheckpointError: a parameter has no name, or the state holds what only pickle could save.
    """
    topology = topology or Topology(data=writer.world_size, rank=writer.rank)
    shards = shards or {}
    container = container_of(optimizer, topology.data_rank)
    mine = describe(container, names, shards)
    for slot in mine["slots"]:
        _check_file_name(slot)
    stages = Exchange(topology, "pipeline", container.device).gather_objects(mine)
    earlier = {name for stage in stages[: topology.pipeline_rank] for name in stage["parameters"]}
    if writer.rank == 0:
        writer.write_json(SCALARS, merge(stages))
    pieces = [
        _Piece(names[place.parameter], shards.get(place.parameter), cell, place)
        for cell in container.cells
        for place in cell.places
        if names[place.parameter] not in earlier
    ]
    deal = _Deal(container, [piece for piece in pieces if piece.shard or topology.tensor_rank == 0], topology)
    for slot in mine["slots"]:
        writer.write_boxes(slot_stem(slot), list(deal.boxes(slot)), copied=container.scattered)


@dataclass(frozen=True)
class _Piece:
    """What this rank holds of one parameter's state."""

    name: str
    shard: Shard | None
    cell: Cell
    place: Place


class _Deal:
    """Which rank of the data group writes what, and how the other ranks' pieces come there."""

    def __init__(self, container: Container, pieces: list[_Piece], topology: Topology) -> None:
        self._container, self._pieces, self._topology = container, pieces, topology
        if container.scattered:
            self._exchange = Exchange(topology, "data", container.device)
            self._held = self._exchange.gather_objects([(p.place.start, p.place.numel) for p in pieces])

    def boxes(self, slot: str) -> Iterator[Box]:
        """The boxes of one slot that this rank writes. Every rank of the data group iterates to the end."""
        for number, piece in enumerate(self._pieces):
            value = slots_of(self._container, piece.cell).get(slot)
            if value is None:
                continue
            if self._container.scattered:
                local = self._gathered(number, piece, slot, value)
            else:
                local = self._dealt(number, value)
            if local is not None:
                # A slot of another shape than its parameter's is no shard of it.
                box = whole_box(piece.name, local, piece.shard if value.shape == piece.cell.key.shape else None)
                if box is not None:
                    yield replace(box, make=partial(self._container.master_of, piece.cell)) if local.is_meta else box

    def _dealt(self, number: int, value: Tensor) -> Tensor | None:
        return value if number % self._topology.data == self._topology.data_rank else None

    def _gathered(self, number: int, piece: _Piece, slot: str, flat: Tensor) -> Tensor | None:
        held = [ranges[number] for ranges in self._held]
        size = len(held)
        owner = max(range(size), key=lambda rank: (held[rank][1], -((rank - number) % size)))
        mine = self._container.elements(piece.cell, piece.place, slot, flat)
        return self._exchange.join(owner, mine, held, whole_shape(piece.place.parameter), flat.dtype)


def _check_file_name(slot: str) -> None:
    if not re.fullmatch(r"\w+", slot):
        raise CheckpointError(f"the optimizer's slot {slot!r} cannot be part of a file name; use letters, digits and _")
