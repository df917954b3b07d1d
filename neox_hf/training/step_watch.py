"""What the trainer does around HF's steps: it times them, and stops the run where the ranks have agreed to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from neox_hf.data import TokenStream

if TYPE_CHECKING:
    from neox_hf.training.trainer import NeoXTrainer


class EvaluationStopped(Exception):
    """All ranks have agreed to stop, in the middle of an evaluation."""


class StepWatch(TrainerCallback):
    """Runs the stopwatch and carries a stop request into HF's control flow."""

    def __init__(self, trainer: "NeoXTrainer") -> None:
        self.trainer = trainer
        self._may_stop_evaluation = False

    @contextmanager
    def stoppable_evaluation(self) -> Iterator[None]:
        """Let a stop end the evaluation within by `EvaluationStopped`, which the caller catches.

        One that a callback asks for runs to its end: nobody would catch it there, and the run would end unsaved.
        """
        self._may_stop_evaluation = True
        try:
            yield
        finally:
            self._may_stop_evaluation = False

    def on_step_begin(self, args, state, control, **kwargs: object) -> None:
        self.trainer.throughput.start()

    def on_prediction_step(self, args, state, control, **kwargs: object) -> None:
        if self._may_stop_evaluation and self.trainer.stop.agree():
            raise EvaluationStopped

    def on_step_end(self, args, state, control, **kwargs: object):
        if isinstance(self.trainer.train_dataset, TokenStream):
            # A stream is one long epoch; HF would count it from where this process resumed.
            state.epoch = state.global_step / state.max_steps
        if self.trainer.stop.agree():
            control.should_save = True
            control.should_evaluate = False  # there is no time, and under `save_strategy: best` it would decide
            control.should_training_stop = True
        return control
