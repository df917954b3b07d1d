"""The main job: what `recipes/pretrain.py` runs once its recipe has been read."""

import logging
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from neox_hf.checkpoint import OutputLock
from neox_hf.checkpoint.directory import finished_checkpoints, recover
from neox_hf.checkpoint.hub import HubPublisher
from neox_hf.data import TokenStream, build_tokenizer, evaluation_batches
from neox_hf.data.bad_rows import without_copies
from neox_hf.errors import CheckpointError, DataError, DivergenceError
from neox_hf.parallel.collectives import end_of_gloo, first_rank_first, from_first_rank
from neox_hf.parallel.topology import Topology
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.first_model import first_model
from neox_hf.training.provenance import run_documents
from neox_hf.training.recipe import Recipe
from neox_hf.training.report import finish_run
from neox_hf.training.trainer import NeoXTrainer

logger = logging.getLogger(__name__)

STOPPED_BY_SIGNAL = 143
SECONDS_TO_PUSH_IN_A_HURRY = 5.0


def pretrain(recipe: Recipe) -> int:
    """Train what `recipe` describes and publish it. Returns the exit code: 0, 143 after a stop signal, 1 if a push
    that the recipe requires is still pending.

    Raises:
        RecipeError, TopologyError, DataError, CheckpointError, DivergenceError: see `neox_hf.errors`.
    """
    disable_progress_bar()  # of writing shards; training's own is HF's callback
    with end_of_gloo(), ExitStack() as held:
        args = recipe.training_arguments()
        topology = recipe.topology(args.world_size, args.process_index).connect(timedelta(seconds=args.ddp_timeout))
        _take_output_dir(args, topology, held)
        trainer = build_trainer(recipe, args, topology)
        try:
            trainer.train(args.resume_from_checkpoint)
        except (DataError, DivergenceError):
            push_in_a_hurry(trainer)
            raise
        return stop_run(trainer) if trainer.stop_signal else finish_run(trainer, recipe)


def stop_run(trainer: NeoXTrainer) -> int:
    """End after a stop signal."""
    logger.warning("stopped by signal %d after saving step %d", trainer.stop_signal, trainer.state.global_step)
    push_in_a_hurry(trainer)
    return STOPPED_BY_SIGNAL


def push_in_a_hurry(trainer: NeoXTrainer) -> None:
    """Give uploads little time, since a launcher may kill soon, and tell what stays queued on disk."""
    if trainer.publisher is not None:
        print(trainer.publisher.close(SECONDS_TO_PUSH_IN_A_HURRY))


def build_trainer(recipe: Recipe, args: NeoXTrainingArguments, topology: Topology) -> NeoXTrainer:
    """Tokenizer, model, streams and trainer of one rank, in the order in which they need each other."""
    output_dir = Path(args.output_dir)
    tokenizer = first_rank_first(
        topology, lambda: build_tokenizer(recipe.tokenizer, recipe.data, output_dir / "tokenizer")
    )
    sizes = {"seq_length": recipe.data.seq_length, "partition": recipe.parallel.partition}
    model = first_model(recipe.model, tokenizer, args, topology, **sizes)
    # A replica's ranks read the same rows; one of them tells of the bad ones.
    data = (
        recipe.data if topology.heads_replica else replace(recipe.data, bad_rows=without_copies(recipe.data.bad_rows))
    )
    place = {
        "data_rank": topology.data_rank,
        "data_size": topology.data,
        "vocab_size": model.config.vocab_size,
        "quarantine": output_dir / "quarantine.jsonl",
    }
    # Before the streams: it sets how long the Hub's client waits, and they may talk to the Hub too.
    publisher = HubPublisher(recipe.hub, output_dir) if recipe.hub.push and topology.rank == 0 else None
    evaluates = args.eval_strategy != "no" or args.eval_on_start
    evaluation = {"batch_size": args.per_device_eval_batch_size, **place}
    return NeoXTrainer(
        model,
        args,
        topology=topology,
        train_dataset=TokenStream(data, tokenizer, split="train", **place),
        eval_dataset=evaluation_batches(data, tokenizer, **evaluation) if evaluates else None,
        processing_class=tokenizer,
        workers=recipe.data.workers,
        publisher=publisher,
        locked=True,
        documents=run_documents(recipe.resolved()),
    )


def _take_output_dir(args: NeoXTrainingArguments, topology: Topology, held: ExitStack) -> None:
    """Lock the output directory for this run, on rank 0; every rank raises if it is taken or would be overwritten."""
    lock = OutputLock(args.output_dir)

    def take() -> None:
        held.callback(lock.acquire().release)
        recover(Path(args.output_dir))
        earlier = finished_checkpoints(Path(args.output_dir))
        if earlier and not args.resume_from_checkpoint:
            raise CheckpointError(
                f"{args.output_dir} already holds {earlier[0].name}; continue it with "
                "train.resume_from_checkpoint=latest, or choose another train.output_dir"
            )

    from_first_rank(topology, take)
