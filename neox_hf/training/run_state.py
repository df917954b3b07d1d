"""What of a running trainer goes into a checkpoint, and how it comes back.

Weights and optimizer are boxes of HF tensors; everything else is JSON or, for random states, plain tensors:

    state/optimizer*                       master weights, moments, steps and hyper-parameters
    state/data.json                        position of every stream, counted in samples
    state/scheduler.json, state/rng-*      learning-rate schedule; one random state per rank
    state/guard.json                       steps that were skipped
    state/fp8-*                            scales of eight-bit tensors
    trainer_state.json                     HF's own, with its log history
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from transformers.trainer_callback import ExportableState

from neox_hf.checkpoint import Checkpoint, CheckpointSaver, CheckpointWriter, prune, restore_rng, write_rng
from neox_hf.checkpoint.background import Continuation
from neox_hf.checkpoint.directory import finished_path
from neox_hf.data import merge_states
from neox_hf.training.hyperparameters import RecipeHyperparameters
from neox_hf.training.save_schedule import is_protected
from neox_hf.training.schedule_progress import note_initial_rates, schedule_state

if TYPE_CHECKING:
    from neox_hf.training.trainer import NeoXTrainer

DATA = "state/data.json"
SCHEDULER = "state/scheduler.json"
GUARD = "state/guard.json"
TRAINER_STATE = "trainer_state.json"


class RunState:
    """Saves and restores one trainer.

    Args:
        documents: text files that go into every checkpoint, by relative path.
    """

    def __init__(self, trainer: "NeoXTrainer", documents: dict[str, str]) -> None:
        self.trainer = trainer
        self.documents = documents
        self.saver = CheckpointSaver(trainer.topology, asynchronous=trainer.args.save_in_background)

    def save(self) -> None:
        """Write `checkpoint-N` of the current step, then rotate older ones and publish it. Every rank calls it.

        With `args.save_in_background` it returns when all is copied; the rest happens while training goes on.

        Raises:
            CheckpointError: it cannot be written, or the one before could not.
        """
        self.wait()
        trainer, topology = self.trainer, self.trainer.topology
        writer = CheckpointWriter(
            trainer.args.output_dir,
            trainer.state.global_step,
            rank=topology.rank,
            world_size=topology.world_size,
            barrier=_barrier(topology.world_size),
            memory=self.saver.memory,
        )
        data = self._gather_data_state()
        self._note_best()
        writer.write_weights(trainer.model, trainer.processing_class, topology=topology)
        if topology.rank == 0:
            self._write_documents(writer, data)
        if not trainer.args.save_only_model:
            trainer.engine.save_boxes(writer)
            if trainer.fp8 is not None:
                trainer.fp8.save(writer)
            write_rng(writer)
        self.saver.commit(writer, self._facts(), self._after_writing())

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, if there is one. Every rank calls it.

        Raises:
            CheckpointError: it could not be written.
        """
        self.saver.wait()

    def load(self, checkpoint: Checkpoint) -> None:
        """Give optimizer, schedule and stream what `save` wrote. Nothing changes unless the stream is this run's."""
        trainer = self.trainer
        if trainer.loader is not None:
            trainer.loader.load_state_dict(checkpoint.json(DATA))
        recipe = RecipeHyperparameters(trainer.optimizer, trainer.lr_scheduler)
        trainer.engine.load_boxes(checkpoint)
        if trainer.fp8 is not None:
            trainer.fp8.load(checkpoint)
        if checkpoint.has(GUARD):
            trainer.guard.load_state_dict(checkpoint.json(GUARD))
        recipe.apply(checkpoint.json(SCHEDULER), checkpoint.manifest.step)

    def holds(self, checkpoint: Checkpoint | None, step: int) -> bool:
        """Whether `checkpoint` is the one of `step` in this run's own output directory."""
        own = finished_path(Path(self.trainer.args.output_dir), step)
        return checkpoint is not None and checkpoint.path.resolve() == own.resolve()

    def keep_best_alone(self) -> None:
        """What HF does at the end of a run of which one checkpoint is to be kept and the best is known."""
        args, best = self.trainer.args, self.trainer.state.best_model_checkpoint
        if args.save_total_limit == 1 and best and self.trainer.topology.rank == 0:
            self._prune(Path(best), newest=False)

    def write_beside(self) -> None:
        """Write the documents into the output directory itself, once this run is known to be the one it holds, and
        note the learning rates that it begins with: neither is known earlier, and the first step is next."""
        note_initial_rates(self.trainer.optimizer)
        if self.trainer.topology.rank == 0:
            for relative_path, text in self.documents.items():
                (Path(self.trainer.args.output_dir) / relative_path).write_text(text, encoding="utf-8")

    def load_rng(self, checkpoint: Checkpoint) -> None:
        """Give this rank its random states back, last before the first step."""
        restore_rng(checkpoint, self.trainer.topology)

    def _write_documents(self, writer: CheckpointWriter, data: dict[str, Any] | None) -> None:
        trainer = self.trainer
        if data is not None:
            writer.write_json(DATA, data)
        if trainer.lr_scheduler is not None:
            writer.write_json(SCHEDULER, schedule_state(trainer.lr_scheduler))
        writer.write_json(GUARD, trainer.guard.state_dict())
        self._note_callbacks()
        writer.write_json(TRAINER_STATE, dataclasses.asdict(trainer.state))
        for relative_path, text in self.documents.items():
            writer.write_bytes(relative_path, text.encode())

    def _gather_data_state(self) -> dict[str, Any] | None:
        """The position of all streams, on rank 0."""
        trainer = self.trainer
        if trainer.loader is None:
            return None
        topology = trainer.topology
        mine = trainer.loader.state_dict() if topology.heads_replica else None
        if topology.world_size == 1:
            return merge_states([mine])
        states: list[Any] = [None] * topology.world_size
        dist.all_gather_object(states, mine)
        replicas = [state for state in states if state is not None]  # the ranks of one all stand at the same place
        return merge_states(replicas) if topology.rank == 0 else None

    def _note_best(self) -> None:
        """HF decides which step was best; its checkpoint's path is known only where checkpoints are made."""
        state = self.trainer.state
        if state.best_global_step:
            best = finished_path(Path(self.trainer.args.output_dir), state.best_global_step)
            if best.exists() or state.best_global_step == state.global_step:
                state.best_model_checkpoint = str(best)

    def _note_callbacks(self) -> None:
        trainer = self.trainer
        exportable = [*trainer.callback_handler.callbacks, trainer.control]
        states: dict[str, Any] = {}
        for callback in (one for one in exportable if isinstance(one, ExportableState)):
            name = type(callback).__name__
            if name in states:
                states[name] = [*(states[name] if isinstance(states[name], list) else [states[name]]), callback.state()]
            else:
                states[name] = callback.state()
        trainer.state.stateful_callbacks = states

    def _facts(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "consumed_tokens": trainer.state.num_input_tokens_seen,
            "precision": trainer.args.precision,
            "pipeline": trainer.topology.pipeline,
            "data": trainer.topology.data,
            "tensor": trainer.topology.tensor,
        }

    def _after_writing(self) -> Continuation:
        """What rank 0 does with a checkpoint once it is whole, perhaps in another thread: it uses what is known now."""
        args, publisher = self.trainer.args, self.trainer.publisher
        step, best = self.trainer.state.global_step, self.trainer.state.best_model_checkpoint

        def rotate_and_publish(written: Path) -> None:
            if args.save_total_limit:
                self._prune(Path(best) if best else None, written)
            if publisher is not None:
                publisher.publish_step(written, step)

        return rotate_and_publish

    def _prune(self, best: Path | None, written: Path | None = None, newest: bool = True) -> None:
        args = self.trainer.args
        prune(
            args.output_dir,
            args.save_total_limit,
            lambda saved: is_protected(saved, args.save_schedule),
            best=best,
            written=written,
            newest=newest,
        )


def _barrier(world_size: int) -> Callable[[], None]:
    return dist.barrier if world_size > 1 else lambda: None
