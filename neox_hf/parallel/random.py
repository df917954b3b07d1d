"""Random numbers that differ between the ranks of a tensor group, where those of the default generators agree."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_random(rank: int, size: int, device: torch.device) -> Iterator[None]:
    """A context whose draws on `device` and on the CPU are this rank's own.

    They start from one number of the default CPU generator, which is the same on every rank of the group; the default
    generators go on after the context as if that number were all that had been drawn. Nothing is remembered, so
    whoever restores the default generators (activation checkpointing, a resumed run) gets the same draws again.
    """
    # Neighbouring seeds: a CPU generator reads the lowest 32 bits alone, and they must differ between ranks.
    seed = int(torch.randint(2**48, (), device="cpu")) * size + rank
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for one in cuda:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield
