"""The state of an optimizer on its way to disk: one format, whatever contains it and however it is laid out.

A *slot* is a tensor that the optimizer keeps per parameter (`exp_avg`, `momentum_buffer`, `master`, ...): boxes under
Hugging Face names, one file per slot and rank. Everything else is JSON (`optimizer_document`).
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from neox_hf.checkpoint.boxes import Box
from neox_hf.checkpoint.exchange import Exchange
from neox_hf.checkpoint.optimizer_containers import Container, container_of
from neox_hf.checkpoint.optimizer_document import SCALARS, Names, Shards, describe, merge, slot_stem, slots_of
from neox_hf.checkpoint.optimizer_pieces import Piece
from neox_hf.checkpoint.writer import CheckpointWriter
from neox_hf.errors import CheckpointError
from neox_hf.parallel.topology import Topology


def write_optimizer(
    writer: CheckpointWriter,
    optimizer: Any,
    names: Names,
    shards: Shards | None = None,
    topology: Topology | None = None,
) -> None:
    """Write the optimizer's state. Every rank calls it.

    Each rank writes the elements that it alone of its data group holds. What several ranks hold is written once: by the
    data ranks in turn, the first of the tensor ranks, the first of the stages. No tensor travels.

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
    description = describe(container, names, shards)
    for slot in description["slots"]:
        _check_file_name(slot)
    stages = Exchange(topology, "pipeline", container.device).gather_objects(description)
    earlier = {name for stage in stages[: topology.pipeline_rank] for name in stage["parameters"]}
    if writer.rank == 0:
        writer.write_json(SCALARS, merge(stages))
    pieces = [
        Piece(names[place.parameter], shards.get(place.parameter), cell, place)
        for cell in container.cells
        for place in cell.places
        if names[place.parameter] not in earlier
    ]
    pieces = [piece for piece in pieces if piece.shard or topology.tensor_rank == 0]
    mine = [p for turn, p in enumerate(pieces) if not p.cell.whole or turn % topology.data == topology.data_rank]
    for slot in description["slots"]:
        writer.write_boxes(slot_stem(slot), [box for piece in mine for box in _boxes(container, piece, slot)])


def _boxes(container: Container, piece: Piece, slot: str) -> Iterator[Box]:
    value = slots_of(container, piece.cell).get(slot)
    if value is None:
        return
    if container.makes(slot):
        yield from piece.boxes(torch.empty_like(value, device="meta"), partial(container.make_master, piece.cell))
    else:
        yield from piece.boxes(value)


def _check_file_name(slot: str) -> None:
    if not re.fullmatch(r"\w+", slot):
        raise CheckpointError(f"the optimizer's slot {slot!r} cannot be part of a file name; use letters, digits and _")
