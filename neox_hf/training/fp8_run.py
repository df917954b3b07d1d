"""`train.precision: fp8` in a run: the scales of its eight-bit tensors, from step to step and from run to run.

state/fp8-*        the histories that scales follow from, by the first rank: after each step all have the same
"""

import logging
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from neox_hf.checkpoint import Checkpoint, CheckpointWriter
from neox_hf.checkpoint.directory import rank_file
from neox_hf.modeling.fp8_layers import compute_in_fp8, refresh_fp8_weights

if TYPE_CHECKING:
    from neox_hf.training.trainer import NeoXTrainer

logger = logging.getLogger(__name__)

STEM = "fp8"


class Fp8Run(TrainerCallback):
    """Has the trainer's model, which is on its device, train in eight bits.

    Raises:
        RecipeError: see `compute_in_fp8`.
    """

    def __init__(self, trainer: "NeoXTrainer") -> None:
        self.model, self.topology = trainer.model, trainer.topology
        self.scales = compute_in_fp8(self.model)

    def on_train_begin(self, args, state, control, **kwargs: object) -> None:
        refresh_fp8_weights(self.model)

    def on_optimizer_step(self, args, state, control, **kwargs: object) -> None:
        self.scales.advance(self._reduce)
        refresh_fp8_weights(self.model)

    def _reduce(self, magnitudes: Tensor) -> None:
        if self.topology.world_size > 1:
            dist.all_reduce(magnitudes, dist.ReduceOp.MAX)

    def forget(self) -> None:
        """Other weights were loaded."""
        self.scales.recalibrate()

    def save(self, writer: CheckpointWriter) -> None:
        if self.topology.rank == 0:
            writer.write_tensors(STEM, self.scales.state_dict(), {})

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on with the scales that `save` wrote. A run that was saved in another precision has none."""
        if checkpoint.has(rank_file(STEM, 0, checkpoint.manifest.world_size)):
            self.scales.load_state_dict(checkpoint.tensors(STEM, 0)[0])
            return
        self.scales.recalibrate()
        logger.warning("%s holds no fp8 scales: the next step finds them from its own values", checkpoint.path)
