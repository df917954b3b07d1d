"""Random number generators: their state in tensors and JSON, and what a resumed run does with it.

The same layout continues every generator bit for bit. Another one has no such state for its ranks: each rank then seeds
all its generators from sha256(state of the saved rank 0, step, its pipeline and data rank, the new sizes), so that the
run is still a function of the recipe and of where it was interrupted. The ranks of a tensor group get the same seed:
where activations are replicated, their dropout masks must agree.
"""

import hashlib
import json
import logging
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neox_hf.checkpoint.manifest import Manifest
from neox_hf.checkpoint.reader import Checkpoint
from neox_hf.checkpoint.writer import CheckpointWriter
from neox_hf.parallel.topology import AXES, Topology

logger = logging.getLogger(__name__)

STEM = "rng"
VALUES = "values"


@dataclass(frozen=True)
class RngState:
    """tensors: `python` int64, `numpy` int64, `torch` uint8, and `cuda` uint8 where there is one; values: JSON."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def rng_state() -> RngState:
    """The state of Python's, numpy's and torch's generators, and of this process's CUDA device."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached_gauss = np.random.get_state()
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    values = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {"position": int(position), "has_gauss": int(has_gauss), "cached_gauss": float(cached_gauss)},
    }
    return RngState(tensors, values)


def set_rng_state(state: RngState) -> None:
    """Continue from a state of `rng_state`. A CUDA state is left out on a host without CUDA."""
    python, numpy = state.values["python"], state.values["numpy"]
    random.setstate((python["version"], tuple(state.tensors["python"].tolist()), python["gauss"]))
    keys = state.tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached_gauss"]))
    torch.set_rng_state(state.tensors["torch"])
    if not torch.cuda.is_available():
        return
    if "cuda" in state.tensors:
        torch.cuda.set_rng_state(state.tensors["cuda"])
    else:
        seed = _seed(state, "cuda")
        torch.cuda.manual_seed(seed)
        logger.warning("the checkpoint was written without CUDA: its generator is seeded with %d", seed)


def write_rng(writer: CheckpointWriter) -> None:
    """Write this rank's generators into the checkpoint."""
    state = rng_state()
    writer.write_tensors(STEM, state.tensors, {VALUES: json.dumps(state.values)})


def restore_rng(checkpoint: Checkpoint, topology: Topology) -> None:
    """Continue this rank's generators, or seed them anew, and say so, when the run is laid out otherwise."""
    theirs, ours = layout_of(checkpoint.manifest), {axis: getattr(topology, axis) for axis in AXES}
    tensors, header = checkpoint.tensors(STEM, topology.rank if theirs == ours else 0)
    state = RngState(tensors, json.loads(header[VALUES]))
    if theirs == ours:
        set_rng_state(state)
        return
    seed = _seed(state, checkpoint.manifest.step, topology.pipeline_rank, topology.data_rank, *ours.values())
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # CUDA included
    logger.warning(
        "%s was written by %s processes, this run has %s: rank %d seeds its random number generators with %d, derived "
        "from the saved ones",
        checkpoint.path,
        _in_words(theirs),
        _in_words(ours),
        topology.rank,
        seed,
    )


def layout_of(manifest: Manifest) -> dict[str, int]:
    """Sizes of the axes of the run that wrote a checkpoint; all of it data parallel where its metadata says nothing."""
    named = {"pipeline": 1, "data": manifest.world_size, "tensor": 1, **manifest.metadata}
    return {axis: named[axis] for axis in AXES}


def _in_words(sizes: dict[str, int]) -> str:
    return " x ".join(f"{size} {axis}" for axis, size in sizes.items())


def _seed(state: RngState, *salt: object) -> int:
    digest = hashlib.sha256(json.dumps([state.values, *salt], sort_keys=True).encode())
    for name in ("python", "numpy", "torch"):
        digest.update(state.tensors[name].numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "little") >> 1  # torch takes signed seeds
