"""Where one process stands in the world: a frozen value that travels as an argument."""

import dataclasses
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from neox_hf.errors import TopologyError
from neox_hf.parallel.exchange import Exchange
from neox_hf.parallel.neighbour import Neighbour
from neox_hf.parallel.pair import Pair
from neox_hf.parallel.peer_memory import PATIENCE

AXES = ("pipeline", "data", "tensor")
"""From the outermost to the innermost: ranks of one tensor group are neighbours."""


@dataclass(frozen=True)
class Groups:
    """This rank's process group along each axis. None where the axis is the whole world, or is one process long.

    What two devices send each other without a process group's help: `exchange`, those of a tensor group; `previous` and
    `next`, this rank's and that of the stage before or behind.
    """

    pipeline: dist.ProcessGroup | None = None
    data: dist.ProcessGroup | None = None
    tensor: dist.ProcessGroup | None = None
    exchange: Exchange | None = None
    previous: Neighbour | None = None
    next: Neighbour | None = None


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Sizes of the three axes, this process's rank and, once connected, its process groups.

    All sizes are counts of processes; coordinates count from 0. `sequence`: inside a tensor group, norms and residuals
    are sharded along the sequence. `copies`: two devices copy into each other's memory what a tensor group of two sums,
    and what neighbouring stages send.
    """

    pipeline: int = 1
    data: int = 1
    tensor: int = 1
    rank: int = 0
    sequence: bool = False
    copies: bool = False
    groups: Groups = field(default_factory=Groups, compare=False, repr=False)

    @classmethod
    def single(cls) -> "Topology":
        """One process: every parallel region is an identity."""
        return cls()

    @classmethod
    def from_world(
        cls,
        world_size: int,
        rank: int,
        *,
        tensor: int = 1,
        pipeline: int = 1,
        sequence: bool = False,
        copies: bool = False,
    ) -> "Topology":
        """Lay `world_size` processes out; the data size is what tensor and pipeline leave.

        Raises:
            TopologyError: the model-parallel sizes do not divide the world.
        """
        model_size = tensor * pipeline
        if world_size % model_size:
            raise TopologyError(
                f"parallel.tensor={tensor} x parallel.pipeline={pipeline} = {model_size} does not divide "
                f"world_size={world_size}, so no data size fits; launch {model_size} processes or a multiple of it"
            )
        return cls(
            pipeline=pipeline,
            data=world_size // model_size,
            tensor=tensor,
            rank=rank,
            sequence=sequence and tensor > 1,
            copies=copies and (tensor == 2 or pipeline > 1),
        )

    def connect(self, patience: timedelta = PATIENCE) -> "Topology":
        """The same place with its process groups. Every rank of the world calls it, once.

        patience: with copies between devices that do not come; the groups have that of the world's.
        """
        mine = {axis: self._new_groups(axis) for axis in AXES if 1 < getattr(self, axis) < self.world_size}
        if self._may_copy():
            exchange = Exchange(Pair(mine.get("tensor"), patience=patience)) if self.tensor == 2 else None
            mine |= {"exchange": exchange, **self._new_neighbours(patience)}
        return dataclasses.replace(self, groups=Groups(**mine))

    def axis_ranks(self, axis: str) -> list[list[int]]:
        """World ranks of every group along `axis`, which is one of AXES."""
        steps = {"tensor": 1, "data": self.tensor, "pipeline": self.tensor * self.data}
        step, size = steps[axis], getattr(self, axis)
        firsts = [rank for rank in range(self.world_size) if rank // step % size == 0]
        return [[first + step * place for place in range(size)] for first in firsts]

    def _new_groups(self, axis: str) -> dist.ProcessGroup:
        mine, _ = dist.new_subgroups_by_enumeration(self.axis_ranks(axis))
        return mine

    def _may_copy(self) -> bool:
        return self.copies and "nccl" in dist.get_backend()

    def _new_neighbours(self, patience: timedelta) -> dict[str, Neighbour]:
        found = {}
        for first in range(self.pipeline - 1):
            ranks = [stages[first : first + 2] for stages in self.axis_ranks("pipeline")]
            group, _ = dist.new_subgroups_by_enumeration(ranks)
            if self.pipeline_rank in (first, first + 1):
                pair = Pair(group, patience=patience)
                found["next" if self.pipeline_rank == first else "previous"] = Neighbour(pair)
        return found

    def __str__(self) -> str:
        return f"{self.world_size} = {self.pipeline} pipeline x {self.data} data x {self.tensor} tensor"

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data * self.tensor

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor % self.data

    @property
    def pipeline_rank(self) -> int:
        return self.rank // (self.tensor * self.data)

    @property
    def replica_size(self) -> int:
        """Processes that hold one replica of the model together."""
        return self.tensor * self.pipeline

    @property
    def splits_model(self) -> bool:
        """Whether one replica takes more than one process."""
        return self.tensor > 1 or self.pipeline > 1

    @property
    def heads_replica(self) -> bool:
        """Whether this rank speaks for its replica: its first stage's first tensor rank."""
        return self.tensor_rank == 0 and self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline - 1
