"""A writer that kills its own process in a chosen phase; run in a child process."""

import os
import signal
from pathlib import Path

import torch
import transformers

from neox_hf.checkpoint import Box, CheckpointWriter, durable, writer
from tests.checkpoint.conftest import build

PHASES = (
    "write_weights",
    "write_boxes",
    "write_json",
    "seal",
    "write_manifest",
    "make_names_durable",
    "set_aside",
    "rename",
    "remove_set_aside",
)


def write(output_dir: Path, step: int, value: float) -> Path:
    """Write a checkpoint that holds `value` in every one of its parts."""
    ours = CheckpointWriter(output_dir, step)
    model = build("stock", num_hidden_layers=1)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(value)
    ours.write_weights(model)
    ours.write_boxes("optimizer.exp_avg", [Box.whole("w", torch.full((8,), value))])
    ours.write_json("state/data.json", {"value": value})
    return ours.commit({"value": value})


def write_and_die(output_dir: Path, step: int, value: float, phase: str, when: str) -> None:
    """Die by SIGKILL before or after `phase`."""
    transformers.utils.logging.disable_progress_bar()
    method = getattr(CheckpointWriter, phase)

    def dying(self, *args, **kwargs):
        if when == "before":
            die()
        method(self, *args, **kwargs)
        die()

    setattr(CheckpointWriter, phase, dying)
    write(output_dir, step, value)


def write_and_die_in_a_file(output_dir: Path, step: int, value: float, name: str) -> None:
    """Die by SIGKILL with half of the file `name` written."""
    transformers.utils.logging.disable_progress_bar()
    sync = durable.sync_file

    def dying(path: Path) -> None:
        if path.name == name:
            os.truncate(path, path.stat().st_size // 2)
            die()
        sync(path)

    durable.sync_file = writer.sync_file = dying
    write(output_dir, step, value)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
