"""Checkpoints: a directory that is a Hub repository and resumable at once."""

from neox_hf.checkpoint.background import CheckpointSaver
from neox_hf.checkpoint.boxes import Box, BoxReader, fill_boxes
from neox_hf.checkpoint.directory import recover
from neox_hf.checkpoint.final import write_final
from neox_hf.checkpoint.lock import OutputLock
from neox_hf.checkpoint.manifest import FileRecord, Manifest
from neox_hf.checkpoint.optimizer_loading import load_optimizer
from neox_hf.checkpoint.optimizer_saving import write_optimizer
from neox_hf.checkpoint.reader import Checkpoint, open_checkpoint
from neox_hf.checkpoint.released import load_released_weights, released_files
from neox_hf.checkpoint.rng import restore_rng, rng_state, write_rng
from neox_hf.checkpoint.rotation import prune
from neox_hf.checkpoint.verify import Found, find_latest, read_manifest, verify_checkpoint
from neox_hf.checkpoint.weight_names import hf_names
from neox_hf.checkpoint.writer import CheckpointWriter

__all__ = [
    "Box",
    "BoxReader",
    "Checkpoint",
    "CheckpointSaver",
    "CheckpointWriter",
    "FileRecord",
    "Found",
    "Manifest",
    "OutputLock",
    "fill_boxes",
    "find_latest",
    "hf_names",
    "load_optimizer",
    "load_released_weights",
    "open_checkpoint",
    "prune",
    "read_manifest",
    "recover",
    "released_files",
    "restore_rng",
    "rng_state",
    "verify_checkpoint",
    "write_final",
    "write_optimizer",
    "write_rng",
]
