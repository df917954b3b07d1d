"""A model's weights on their way to disk: which file holds what, which rank writes it, how its tensors come there.

The plan follows from the model and the topology alone. A file belongs to one pipeline stage and is written by one of
its ranks; the tensor shards, or the ZeRO-3 partitions, of its tensors come there one tensor at a time.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_hf.checkpoint.exchange import Exchange
from neox_hf.checkpoint.host_memory import HostMemory
from neox_hf.checkpoint.partitioned import is_partitioned, partition_of, partition_range
from neox_hf.checkpoint.weight_names import Weight
from neox_hf.parallel.shards import Shard
from neox_hf.parallel.topology import Topology

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
METADATA = {"format": "pt"}
"""Says that torch wrote the file, which transformers before 5 wants to know."""


@dataclass(frozen=True)
class PlannedFile:
    """One file of weights. stage: pipeline rank that holds them. number: of the file among those of its stage."""

    name: str
    weights: tuple[Weight, ...]
    stage: int
    number: int


def plan_files(weights: list[Weight], stages: list[int], bytes_of: dict[Weight, int], limit: int) -> list[PlannedFile]:
    """Deal weights to files of at most `limit` bytes, a larger tensor alone in its own, in the order of the stages.

    stages: of each weight.
    """
    runs: list[tuple[int, list[Weight]]] = []
    room = 0
    for stage, weight in sorted(zip(stages, weights, strict=True), key=lambda pair: pair[0]):
        if not runs or runs[-1][0] != stage or bytes_of[weight] > room:
            runs.append((stage, []))
            room = limit
        runs[-1][1].append(weight)
        room -= bytes_of[weight]
    names = [f"model-{at:05}-of-{len(runs):05}.safetensors" for at in range(1, len(runs) + 1)]
    names = [SINGLE] if len(runs) == 1 else names
    seen = [stage for stage, _ in runs]
    return [
        PlannedFile(name, tuple(members), stage, seen[:at].count(stage))
        for at, (name, (stage, members)) in enumerate(zip(names, runs, strict=True))
    ]


class WeightFiles:
    """The files of weights under a topology. Every rank constructs it, and iterates over `mine` to the end.

    weights: those of a model, from `weights_of`, or some of them.
    memory: where the tensors that it gives are to lie; without it some are the model's own.
    index: content of the index; None where one file holds everything.
    """

    def __init__(
        self,
        weights: list[Weight],
        topology: Topology,
        dtype: torch.dtype | None = None,
        limit: int = SHARD_BYTES,
        memory: HostMemory | None = None,
    ) -> None:
        self._topology, self._dtype, self._memory = topology, dtype, memory
        self._empty = torch.empty if memory is None else memory.empty
        self._partitioned = any(is_partitioned(weight.tensor) for weight in weights)
        device = next(weight.tensor.device for weight in weights if weight.is_local)
        self._tensor = Exchange(topology, "tensor", device)
        self._data = Exchange(topology, "data", device) if self._partitioned else None
        local = {weight.name for weight in weights if weight.is_local}
        holders = Exchange(topology, "pipeline", device).gather_objects(local)
        stages = [next(at for at, names in enumerate(holders) if weight.name in names) for weight in weights]
        sizes = {weight: math.prod(weight.shape) * self._dtype_of(weight).itemsize for weight in weights}
        self.files = plan_files(weights, stages, sizes, limit)
        self.index = self._index(sizes) if len(self.files) > 1 else None

    def mine(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The files that this rank writes, one at a time: name, and whole tensors under their names on disk."""
        here = self._topology
        for file in self.files:
            # The data ranks take turns first, so that their tensor groups gather at the same time.
            data, tensor = file.number % here.data, file.number // here.data % here.tensor
            if file.stage != here.pipeline_rank or (here.data_rank != data and not self._partitioned):
                continue
            gathered = {weight.name: self._gather(weight, data, tensor) for weight in file.weights}
            if (data, tensor) == (here.data_rank, here.tensor_rank):
                yield file.name, gathered

    def _gather(self, weight: Weight, data: int, tensor: int) -> Tensor | None:
        """The whole tensor, on the rank at these places of the data and the tensor group; every rank of it calls."""
        if is_partitioned(weight.tensor):
            whole = self._from_partitions(weight, data)
        elif weight.shard is not None:
            whole = self._from_shards(weight, weight.shard, tensor)
        else:
            own = weight.tensor.detach()
            whole = own if self._memory is None else self._memory.copy(own)
        return None if whole is None else whole.to(self._dtype_of(weight))

    def _from_shards(self, weight: Weight, mine: Shard, owner: int) -> Tensor | None:
        shards = siblings(mine, weight.tensor.shape[mine.dim], self._tensor.size)
        shapes = [(*s.shape[: s.dim], s.length, *s.shape[s.dim + 1 :]) if s.length else None for s in shards]
        part = mine.real(weight.tensor.detach()) if mine.length else None
        parts = self._tensor.collect(owner, part, shapes, weight.dtype)
        if not parts:
            return None
        whole = self._empty(weight.shape, dtype=weight.dtype)
        for shard, part in zip(shards, parts, strict=True):
            if shard.length:
                shard.cut(whole).copy_(part)
        return whole

    def _from_partitions(self, weight: Weight, owner: int) -> Tensor | None:
        ranges = [partition_range(weight.tensor, rank) for rank in range(self._data.size)]
        mine = partition_of(weight.tensor, self._topology.data_rank)
        return self._data.join(owner, mine, ranges, weight.shape, weight.dtype, self._empty)

    def _dtype_of(self, weight: Weight) -> torch.dtype:
        return self._dtype if self._dtype is not None and weight.dtype.is_floating_point else weight.dtype

    def _index(self, sizes: dict[Weight, int]) -> bytes:
        metadata = {
            "total_parameters": sum(math.prod(weight.shape) for weight in sizes),
            "total_size": sum(sizes.values()),
        }
        places = {weight.name: file.name for file in self.files for weight in file.weights}
        return (json.dumps({"metadata": metadata, "weight_map": places}, indent=2, sort_keys=True) + "\n").encode()


def siblings(mine: Shard, share: int, size: int) -> list[Shard]:
    """The shards of all `size` tensor ranks, from one of them and its length in memory, padding included."""
    return [Shard.of_rank(mine.dim, mine.shape, rank, size, padded=share * size) for rank in range(size)]
