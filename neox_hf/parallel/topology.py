"""Where one process stands in the world: a frozen value that travels as an argument."""

from dataclasses import dataclass

from neox_hf.errors import TopologyError


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Sizes of the three axes and this process's rank. Axes from outermost to innermost: pipeline, data, tensor.

    All sizes are counts of processes; coordinates count from 0.
    """

    pipeline: int = 1
    data: int = 1
    tensor: int = 1
    rank: int = 0

    @classmethod
    def single(cls) -> "Topology":
        """One process: every parallel region is an identity."""
        return cls()

    @classmethod
    def from_world(cls, world_size: int, rank: int, *, tensor: int = 1, pipeline: int = 1) -> "Topology":
        """Lay `world_size` processes out; the data size is what tensor and pipeline leave.

        Raises:
            TopologyError: the model-parallel sizes do not divide the world.
        """
        model_size = tensor * pipeline
        if world_size % model_size:
            raise TopologyError(
                f"parallel.tensor={tensor} x parallel.pipeline={pipeline} = {model_size} does not divide "
                f"world_size={world_size}; launch {model_size} processes or a multiple of it"
            )
        return cls(pipeline=pipeline, data=world_size // model_size, tensor=tensor, rank=rank)

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
