"""The engine of split models: DeepSpeed's pipeline engine over this rank's `Stage`, with ZeRO-1 among the replicas.

It serves every layout with tensor or pipeline > 1, one stage included. DeepSpeed averages the losses of micro-batches
and replicas, which is the mean over all labels only where every micro-batch has as many; so each micro-batch's loss
goes in as a sum with a weight that the averages turn into the division by the step's labels.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from itertools import islice
from typing import TYPE_CHECKING

import deepspeed
import torch
import torch.distributed as dist
from accelerate.utils.memory import clear_device_cache
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.engine import PipelineEngine as Driver
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from neox_hf.data import EvaluationBatches
from neox_hf.modeling.stage import Stage
from neox_hf.parallel.collectives import together
from neox_hf.training.deepspeed_optimizer import DeepSpeedOptimizer
from neox_hf.training.graphs import graph_layers
from neox_hf.training.label_weights import count_labels
from neox_hf.training.pipeline_limits import check_batches, check_prediction, check_trainer, check_trains
from neox_hf.training.pipeline_module import StageModule
from neox_hf.training.split_backward import PostponedProducts, split_backward
from neox_hf.training.stage_messages import StageMessages

if TYPE_CHECKING:
    from neox_hf.training.trainer import NeoXTrainer

Piece = tuple[Tensor | tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""One micro-batch for DeepSpeed: what the first stage reads, and for the last one what `Stage.loss` wants as labels."""


class PipelineEngine(DeepSpeedOptimizer):
    """See the module. `driver` is DeepSpeed's engine once there is one."""

    def __init__(self, trainer: "NeoXTrainer") -> None:
        check_trainer(trainer)
        super().__init__(trainer)
        self.stage = Stage.of_materialised(trainer.model, trainer.topology)
        self.driver: Driver | None = None
        self._messages: StageMessages | None = None
        self._collected: list[dict[str, Tensor]] = []

    def prepare(self, model: nn.Module) -> nn.Module:
        """DeepSpeed's engine around this rank's stage; `model` stays what configuration and names are asked of."""
        trainer = self.trainer
        together(self.topology, lambda: check_trains(self.stage, self.topology))
        self.take_accumulation()
        self._let_go()
        self._collected = []  # of a step that was never taken
        with redirect_stdout(io.StringIO()):  # DeepSpeed prints what it has built, its topology and its seeds
            deepspeed.init_distributed(dist.get_backend())  # with torch's process group, which there is already
            module = StageModule(self.stage, self.topology)
        self.driver, trainer.optimizer = trainer.accelerator.prepare(module, trainer.optimizer)
        self._messages = StageMessages(self.driver, self.topology)
        return self.driver

    def _let_go(self) -> None:
        """Of an earlier `train()`'s engine: its last loss holds it, where Python's collector does not see."""
        if self.driver is not None:
            self.driver.loss = None
            self.driver.pipe_buffers.clear()
            self.driver = self._messages = None

    def begin(self) -> None:
        super().begin()
        elsewhere = None if isinstance(self.optimizer, BF16_Optimizer) else "DeepSpeed sums gradients after the layers"
        args, layers = self.trainer.args, self.stage.layers
        graph_layers(self.trainer.model, args, self.topology, layers=layers, reason=elsewhere)

    def postponed_products(self) -> PostponedProducts | None:
        """Of stages that hold no more for it: not of those that compute activations again, which would be kept. A
        tensor group's messages travel behind these products."""
        keeps_all = self.trainer.args.recompute == "none"
        if self.topology.pipeline == 1 or self.topology.tensor > 1 or not keeps_all:
            return None
        return split_backward(self.driver, in_pairs=lambda: self._messages.in_pairs)

    def step(self, model: nn.Module, micro_batch: dict[str, Tensor], num_items: Tensor | int | None) -> Tensor:
        """Collect the micro-batch; with the last of a step, train on all of them.

        Returns the step's loss with its last micro-batch and 0 with the others, which the trainer adds up.
        """
        trainer = self.trainer
        self._collected.append(trainer._prepare_inputs(micro_batch))
        if not trainer.accelerator.sync_gradients:
            return torch.zeros((), device=trainer.args.device)
        batches, self._collected = self._collected, []
        check_batches(len(batches), trainer.args.gradient_accumulation_steps)
        if (often := trainer.args.torch_empty_cache_steps) and trainer.state.global_step % often == 0:
            clear_device_cache()
        labels = torch.as_tensor(num_items, device=trainer.args.device).clamp(min=1)
        weight = len(batches) * self.topology.data / labels.double()
        self._messages.make_room()
        return self.driver.train_batch(_pieces(batches, weight)).detach()

    def evaluate(
        self,
        batches: EvaluationBatches,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean loss over all labels of all data ranks."""
        trainer = self.trainer
        check_prediction(batches, trainer.args.prediction_loss_only or prediction_loss_only)
        if self.driver is None:
            Trainer._prepare_for_training(trainer, trainer.args.max_steps, None, None)
        trainer.callback_handler.eval_dataloader = batches
        self.driver.reset_activation_shape()  # batches of evaluation may be larger or smaller than those of training
        total, labels = self._sums(batches)
        self.driver.reset_activation_shape()
        self.driver.train()
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_loss": total / max(labels, 1)},
            num_samples=trainer.num_examples(batches),
        )

    def _sums(self, batches: EvaluationBatches) -> tuple[float, int]:
        """Summed loss and labels of all data ranks. As many batches at once as there are stages keep all at work."""
        trainer, total = self.trainer, 0.0
        labels = torch.zeros((), dtype=torch.long, device=trainer.args.device)
        for group in _in_groups(batches, self.topology.pipeline):
            group = [trainer._prepare_inputs(batch) for batch in group]
            one = torch.ones((), dtype=torch.double, device=trainer.args.device)
            mean = self.driver.eval_batch(_pieces(group, one), num_micro_batches=len(group))
            total += float(mean) * len(group) * self.topology.data
            labels += sum(count_labels(batch) for batch in group)
            for _ in group:
                trainer.control = trainer.callback_handler.on_prediction_step(
                    trainer.args, trainer.state, trainer.control
                )
        if self.topology.data > 1:
            dist.all_reduce(labels, group=self.topology.groups.data)
        return total, int(labels)


def _pieces(batches: Sequence[dict[str, Tensor]], weight: Tensor) -> Iterator[Piece]:
    weight = weight.float()
    upstream = weight * (1 / len(batches))  # the backward pass begins with one over the micro-batches
    for batch in batches:
        positions = batch.get("position_ids")
        tokens = batch["input_ids"]
        yield (tokens if positions is None else (tokens, positions)), (batch["shift_labels"], weight, upstream)


def _in_groups(batches: Iterable[dict[str, Tensor]], size: int) -> Iterator[list[dict[str, Tensor]]]:
    remaining = iter(batches)
    while group := list(islice(remaining, size)):
        yield group
