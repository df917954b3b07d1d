"""Where random numbers of training come from. Weights and data order have seeds of their own."""

import hashlib

from transformers import set_seed

from neox_hf.parallel.topology import Topology


def seed_process(seed: int, topology: Topology) -> None:
    """Seed this process's default generators.

    A process alone gets `seed` itself. Replicas and stages draw different dropout masks; the ranks of a tensor group
    draw the same ones for what they all hold, and tell their own parts apart themselves.
    """
    if topology.world_size > 1:
        place = f"{seed}:{topology.data_rank}:{topology.pipeline_rank}"
        seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "big")  # numpy takes 32 bits
    set_seed(seed)
