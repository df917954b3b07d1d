"""The tensor region of one of several connected ranks."""

from neox_hf.parallel import TensorRegion, Topology


def region_of(rank: int, sequence: bool = False, size: int = 2) -> TensorRegion:
    return TensorRegion.of(Topology.from_world(size, rank, tensor=size, sequence=sequence).connect())
