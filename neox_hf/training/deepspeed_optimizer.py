"""What DeepSpeed's two engines have in common: an optimizer that clips, skips and scales by itself."""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from transformers import Trainer

from neox_hf.checkpoint import Checkpoint, CheckpointWriter
from neox_hf.training import loss_scale
from neox_hf.training.deepspeed_gradients import sum_in_master_gradients
from neox_hf.training.deepspeed_step import at_once_of, step_at_once
from neox_hf.training.engine import OptimizerBoxes
from neox_hf.training.split_backward import PostponedProducts


class DeepSpeedOptimizer(OptimizerBoxes):
    """The half of an engine that is the same whichever of DeepSpeed's engines steps."""

    def take_accumulation(self) -> None:
        """Tell Accelerate the micro-batches of a step: where its own count differs, it warns and takes DeepSpeed's."""
        self.trainer.accelerator.gradient_accumulation_steps = self.trainer.args.gradient_accumulation_steps

    def begin(self) -> None:
        sum_in_master_gradients(self.optimizer, self.postponed_products())
        step_at_once(self.optimizer)

    def postponed_products(self) -> PostponedProducts | None:
        """What takes the products that are gradients of weights, where they are not computed as they are asked for."""
        return None

    def clip_gradients(self, model: nn.Module) -> Tensor:
        """DeepSpeed clips in its step; the norm is that step's."""
        return Trainer._clip_grad_norm(self.trainer, model)

    def drop_step(self) -> None:
        """DeepSpeed has left weights and optimizer as they were, on every rank; the schedule goes on all the same."""
        self.optimizer.overflow = False

    def whole_masters(self) -> AbstractContextManager[None]:
        """In this context, which all ranks enter, DeepSpeed's masters are whole, to be read and written."""
        at_once = at_once_of(self.optimizer)
        return nullcontext() if at_once is None else at_once.whole_masters()

    def save_boxes(self, writer: CheckpointWriter) -> None:
        super().save_boxes(writer)
        loss_scale.write(writer, self.optimizer)

    def load_boxes(self, checkpoint: Checkpoint) -> None:
        with self.whole_masters():
            super().load_boxes(checkpoint)
        loss_scale.load(checkpoint, self.optimizer)
