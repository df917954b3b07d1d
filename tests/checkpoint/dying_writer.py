"""A writer that kills its own process in a chosen phase; run in a child process."""

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from neox_hf.checkpoint import Box, CheckpointSaver, CheckpointWriter, durable, writer
from neox_hf.parallel.topology import Topology
from tests.checkpoint.conftest import build

PHASES = (
    "write_weights",
    "write_boxes",
    "write_json",
    "write_deferred",
    "seal",
    "write_manifest",
    "make_names_durable",
    "set_aside",
    "rename",
    "remove_set_aside",
)


def write(
    output_dir: Path, step: int, value: float, asynchronous: bool = False, topology: Topology | None = None
) -> None:
    """Write a checkpoint that holds `value` in every one of its parts, each rank its share."""
    topology = topology or Topology.single()
    rank, size = topology.rank, topology.world_size
    barrier = dist.barrier if size > 1 else lambda: None
    saver = CheckpointSaver(topology, asynchronous=asynchronous)
    ours = CheckpointWriter(output_dir, step, rank=rank, world_size=size, barrier=barrier, memory=saver.memory)
    model = build("stock", num_hidden_layers=1)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(value)
    ours.write_weights(model, topology=topology, shard_bytes=5_000)
    share = 8 // size
    ours.write_boxes("optimizer.exp_avg", [Box("w", (share * rank,), (8,), torch.full((share,), value))])
    if rank == 0:
        ours.write_json("state/data.json", {"value": value})
    saver.commit(ours, {"value": value}, lambda path: None)
    saver.wait()


def write_and_die(output_dir: Path, step: int, value: float, phase: str, when: str, asynchronous: bool = False) -> None:
    """Die by SIGKILL before or after `phase`."""
    die_in(phase, when)
    write(output_dir, step, value, asynchronous)


def write_of_two(
    rank: int, port: int, output_dir: Path, step: int, value: float, phase: str, dying: int, asynchronous: bool
) -> None:
    """Write as one of two ranks, of which `dying` dies before `phase`."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    if rank == dying:
        die_in(phase, "before")
    write(output_dir, step, value, asynchronous, Topology.from_world(2, rank))


def die_in(phase: str, when: str) -> None:
    """Make this process kill itself before or after a method of the writer."""
    transformers.utils.logging.disable_progress_bar()
    method = getattr(CheckpointWriter, phase)

    def dying(self, *args, **kwargs):
        if when == "before":
            die()
        method(self, *args, **kwargs)
        die()

    setattr(CheckpointWriter, phase, dying)


def write_and_die_in_a_file(output_dir: Path, step: int, value: float, name: str, asynchronous: bool = False) -> None:
    """Die by SIGKILL with half of the file `name` written."""
    transformers.utils.logging.disable_progress_bar()
    sync = durable.sync_file

    def dying(path: Path) -> None:
        if path.name == name:
            os.truncate(path, path.stat().st_size // 2)
            die()
        sync(path)

    durable.sync_file = writer.sync_file = dying
    write(output_dir, step, value, asynchronous)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
