"""The dynamic loss scale of fp16 in a checkpoint: its size, and how long it has been without an overflow."""

from typing import Any

from neox_hf.checkpoint import Checkpoint, CheckpointWriter

FILE = "state/loss_scale.json"
FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Of DeepSpeed's DynamicLossScaler: what changes in a run."""


def write(writer: CheckpointWriter, optimizer: Any) -> None:
    """Write the scale of one of DeepSpeed's optimizers, on rank 0; nothing where it is not dynamic."""
    scaler = getattr(optimizer, "loss_scaler", None)
    if writer.rank == 0 and getattr(scaler, "dynamic", False):
        writer.write_json(FILE, {name: getattr(scaler, name) for name in FIELDS})


def load(checkpoint: Checkpoint, optimizer: Any) -> None:
    """Go on with the scale that `write` wrote. A run that was saved in another precision has none: it starts anew."""
    scaler = getattr(optimizer, "loss_scaler", None)
    if getattr(scaler, "dynamic", False) and checkpoint.has(FILE):
        for name, value in checkpoint.json(FILE).items():
            setattr(scaler, name, value)
