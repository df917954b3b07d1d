"""Who runs forward, backward and the update: one small interface behind the trainer.

`NativeEngine` is HF's own step over one process or over replicas of the model. Where a replica takes several processes,
the `PipelineEngine` runs the steps; the trainer does not change for it.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch.distributed as dist
from accelerate.state import GradientState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from neox_hf.checkpoint import Checkpoint, CheckpointWriter, hf_names, load_optimizer, write_optimizer
from neox_hf.data import EvaluationBatches
from neox_hf.kernels.weight_gradient import SumInGrad, sum_in
from neox_hf.modeling.causal_lm import GPTNeoXForCausalLM
from neox_hf.parallel.data_parallel import DataParallel, accumulate_gradients_in_fp32
from neox_hf.parallel.parts import ReplicaParts
from neox_hf.parallel.shards import shards_of
from neox_hf.training.fused_adamw import FusedAdamW
from neox_hf.training.graphs import graph_layers
from neox_hf.training.label_weights import WeighedBatches
from neox_hf.training.optimizers import check_keeps_masters

if TYPE_CHECKING:
    from neox_hf.training.trainer import NeoXTrainer


logger = logging.getLogger(__name__)


class Engine(Protocol):
    """What the trainer asks of an engine."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """The module that training runs: `model` itself, or a wrapper around it."""

    def begin(self) -> None:
        """Model and optimizer are prepared and loaded; the first step is next."""

    def step(self, model: nn.Module, micro_batch: dict[str, Tensor], num_items: Tensor | int | None) -> Tensor:
        """Forward and backward of one micro-batch; the loss to log, scalar."""

    def clip_gradients(self, model: nn.Module) -> Tensor:
        """Have the step clip to `max_grad_norm`, here or as it is taken; the norm before."""

    def norm_of_parts(self) -> Tensor | None:
        """Where nothing clips, the norm of gradients of which each rank has a part; None: any rank can tell it."""

    def drop_step(self) -> None:
        """See to it that the step whose gradients are not finite changes neither weights nor optimizer."""

    def evaluate(self, batches, **loop: object) -> EvalLoopOutput:
        """Mean loss over the labels of all ranks' `batches`, a sized iterable with the same length on every rank."""

    def save_boxes(self, writer: CheckpointWriter) -> None:
        """Write what this rank holds of the optimizer's state. Every rank calls it."""

    def load_boxes(self, checkpoint: Checkpoint) -> None:
        """Give the optimizer back what `save_boxes` wrote, under whatever layout."""


def engine_for(trainer: "NeoXTrainer") -> Engine:
    """The engine that runs the trainer's layout."""
    if not trainer.topology.splits_model and not trainer.args.deepspeed:
        return NativeEngine(trainer)
    if not trainer.topology.splits_model:
        from neox_hf.training.zero import ZeroEngine  # imports DeepSpeed

        return ZeroEngine(trainer)
    from neox_hf.training.pipeline_engine import PipelineEngine  # imports DeepSpeed

    return PipelineEngine(trainer)


class OptimizerBoxes:
    """The half of an engine that all engines share: their optimizer, into a checkpoint and back."""

    def __init__(self, trainer: "NeoXTrainer") -> None:
        self.trainer = trainer
        self.topology = trainer.topology

    @property
    def optimizer(self) -> Any:
        """The trainer's optimizer without Accelerate's wrapper: a torch optimizer, or one of DeepSpeed's."""
        optimizer = self.trainer.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def norm_of_parts(self) -> Tensor | None:
        whole = getattr(self.optimizer, "parts", None) is None
        return None if whole else self.optimizer.clip_in_step(math.inf)

    def save_boxes(self, writer: CheckpointWriter) -> None:
        model = self.trainer.model
        write_optimizer(writer, self.optimizer, hf_names(model), shards_of(model), self.topology)

    def load_boxes(self, checkpoint: Checkpoint) -> None:
        model = self.trainer.model
        load_optimizer(self.optimizer, hf_names(model), shards_of(model), checkpoint, self.topology)


class NativeEngine(OptimizerBoxes):
    """Accelerate's replicas, or ours where gradients must be fp32 under bf16 weights; the stock step and loop."""

    def prepare(self, model: nn.Module) -> nn.Module:
        check_keeps_masters(self.optimizer, self.trainer.args)  # which may be the user's own
        if isinstance(model, DataParallel) or not self.trainer.args.numeric.master:
            return model
        # A launcher's world of one counts: on a CPU Accelerate would wrap that in DistributedDataParallel too.
        if self.trainer.accelerator.distributed_type == DistributedType.NO:
            accumulate_gradients_in_fp32(model)
            return model
        # Device placement and compilation as Accelerate does them, but not its bf16 gradient reduction.
        placed = self.trainer.accelerator.prepare_model(model, evaluation_mode=True)
        return DataParallel(placed, parts=self._step_in_parts())

    def _step_in_parts(self) -> ReplicaParts | None:
        """Have the optimizer step this replica's parts, which are returned. None: it is not ours, or has stepped, and
        goes on with everything."""
        optimizer = self.optimizer
        if not isinstance(optimizer, FusedAdamW):
            return None
        if optimizer.parts is None and not optimizer.state and dist.get_world_size() > 1:
            parts = ReplicaParts(p for group in optimizer.param_groups for p in group["params"])
            optimizer.step_in_parts(parts)
            told = (
                "each replica steps its part of %.1f %% of the weights; a tensor that 8 x %d does not divide, all step"
            )
            logger.info(told, 100 * parts.share_cut, dist.get_world_size())
        return optimizer.parts

    def load_boxes(self, checkpoint: Checkpoint) -> None:
        super().load_boxes(checkpoint)
        if getattr(self.optimizer, "parts", None) is not None:
            self.optimizer.parts.gather()  # each replica has rounded its own masters to weights

    def begin(self) -> None:
        """Products sum their weights' gradients where no one listens to autograd's own sums, as torch's DDP does. On a
        CPU that would be slower than autograd."""
        if isinstance(self.optimizer, FusedAdamW):
            self.optimizer.forget_clipping()  # of the run before, with the same optimizer
        args = self.trainer.args
        alone = self.trainer.accelerator.distributed_type == DistributedType.NO
        if alone and not args.numeric.autocast and args.device.type != "cpu":
            for parameter in self.trainer.model.parameters():
                sum_in(parameter, SumInGrad())
        ours = alone or isinstance(self.trainer.model_wrapped, DataParallel)
        reason = None if ours else "torch's replicas exchange gradients while the layers run"
        fp8 = self.trainer.fp8
        ready = None if fp8 is None else lambda: fp8.scales.capturable
        # No GPU has run graphs in eight bits, or with replicas, for long: whoever wants them there asks for them.
        unasked = alone and fp8 is None
        graph_layers(self.trainer.model, args, self.topology, ready=ready, reason=reason, unasked=unasked)

    def step(self, model: nn.Module, micro_batch: dict[str, Tensor], num_items: Tensor | int | None) -> Tensor:
        return Trainer.training_step(self.trainer, model, micro_batch | self._only_loss(num_items), num_items)

    def _only_loss(self, num_items: Tensor | int | None) -> dict[str, Any]:
        """Logits are made where somebody reads them: HF's label smoothing, or a loss function of the user's. And on a
        CPU, where they are faster and memory is not what runs out. HF multiplies a loss over the labels of all
        processes by their number, since gradients are means over them."""
        trainer = self.trainer
        reads_logits = trainer.label_smoother is not None or trainer.compute_loss_func is not None
        replaced = type(trainer).compute_loss is not Trainer.compute_loss
        ours = isinstance(trainer.accelerator.unwrap_model(trainer.model), GPTNeoXForCausalLM)
        on_cpu = trainer.args.device.type == "cpu"
        if not ours or reads_logits or replaced or on_cpu:
            return {}
        return {"skip_logits": True, "loss_factor": 1 if num_items is None else trainer.accelerator.num_processes}

    def clip_gradients(self, model: nn.Module) -> Tensor:
        norm = None
        if isinstance(self.optimizer, FusedAdamW):
            norm = self.optimizer.clip_in_step(self.trainer.args.max_grad_norm)
        return Trainer._clip_grad_norm(self.trainer, model) if norm is None else norm

    def drop_step(self) -> None:
        self.optimizer.zero_grad()

    def evaluate(self, batches, **loop: object) -> EvalLoopOutput:
        if not isinstance(batches, EvaluationBatches):
            return Trainer.evaluation_loop(self.trainer, batches, **loop)
        if self.trainer.model_accepts_loss_kwargs:
            batches = WeighedBatches(batches, self.topology, self.trainer.args)
        with _no_remainder(self.trainer.accelerator.gradient_state):
            return Trainer.evaluation_loop(self.trainer, batches, **loop)


@contextmanager
def _no_remainder(state: GradientState) -> Iterator[None]:
    """Let Accelerate know of no data loader. At the end of the one that training reads it would cut batches that are
    gathered to what that one has left over, as if they were its last."""
    before = state.dataloader_references
    state.dataloader_references = [*before, None]
    try:
        yield
    finally:
        state.dataloader_references = before
