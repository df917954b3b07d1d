"""Who runs forward, backward and the update: one small interface behind the trainer.

`NativeEngine` is HF's own step over one process or over replicas. Tensor and pipeline parallelism bring an engine of
their own; the trainer does not change for it.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from neox_hf.checkpoint import Checkpoint, CheckpointWriter, hf_names, load_optimizer, write_optimizer
from neox_hf.parallel.data_parallel import DataParallel, accumulate_gradients_in_fp32
from neox_hf.parallel.topology import Topology
from neox_hf.training.precision import Precision


class Engine(Protocol):
    """What the trainer asks of an engine."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """The module that training runs: `model` itself, or a wrapper around it."""

    def step(self, model: nn.Module, micro_batch: dict[str, Tensor], num_items: Tensor | int | None) -> Tensor:
        """Forward and backward of one micro-batch; the loss to log, scalar."""

    def evaluate(self, batches, **loop: object) -> EvalLoopOutput:
        """Loss over `batches`, a sized iterable with the same length on every rank."""

    def save_boxes(self, writer: CheckpointWriter) -> None:
        """Write what this rank holds of the optimizer's state. Every rank calls it."""

    def load_boxes(self, checkpoint: Checkpoint) -> None:
        """Give the optimizer back what `save_boxes` wrote, under whatever layout."""


class NativeEngine:
    """Accelerate's replicas, or ours where gradients must be fp32 under bf16 weights; the stock step and loop."""

    def __init__(self, trainer: Trainer, precision: Precision, topology: Topology) -> None:
        self.trainer = trainer
        self.precision = precision
        self.topology = topology

    def prepare(self, model: nn.Module) -> nn.Module:
        if isinstance(model, DataParallel) or not self.precision.master:
            return model
        if self.topology.data == 1:
            accumulate_gradients_in_fp32(model)
            return model
        # Device placement and compilation as Accelerate does them, but not its bf16 gradient reduction.
        return DataParallel(self.trainer.accelerator.prepare_model(model, evaluation_mode=True))

    def step(self, model: nn.Module, micro_batch: dict[str, Tensor], num_items: Tensor | int | None) -> Tensor:
        return Trainer.training_step(self.trainer, model, micro_batch, num_items)

    def evaluate(self, batches, **loop: object) -> EvalLoopOutput:
        return Trainer.evaluation_loop(self.trainer, batches, **loop)

    def save_boxes(self, writer: CheckpointWriter) -> None:
        write_optimizer(writer, self._optimizer(), hf_names(self.trainer.model))

    def load_boxes(self, checkpoint: Checkpoint) -> None:
        load_optimizer(self._optimizer(), hf_names(self.trainer.model), checkpoint)

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = self.trainer.optimizer
        return getattr(optimizer, "optimizer", optimizer)
