"""`NeoXTrainer`: HF's Trainer over exact streams, an engine, and checkpoints that verify.

The loop is HF's. What is overridden are its hooks: where batches come from, who runs a step, what a checkpoint is,
when to stop, and what is logged.
"""

import functools
import logging
import math
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from neox_hf.checkpoint import Checkpoint, OutputLock, write_final
from neox_hf.checkpoint.hub import HubPublisher, PublishReport
from neox_hf.data import EvaluationBatches, StreamLoader, TokenStream
from neox_hf.errors import DivergenceError
from neox_hf.modeling.accounting import flops_per_token
from neox_hf.modeling.recompute import recompute_selectively
from neox_hf.parallel.collectives import from_first_rank
from neox_hf.parallel.topology import Topology
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.compiled_layers import compile_layers
from neox_hf.training.divergence import GradientGuard
from neox_hf.training.engine import engine_for
from neox_hf.training.fp8_run import Fp8Run
from neox_hf.training.label_weights import NUM_ITEMS
from neox_hf.training.model_for_run import model_for_run
from neox_hf.training.optimizers import optimizer_class
from neox_hf.training.resume import checkpoint_to_resume, open_on_all_ranks
from neox_hf.training.run_state import RunState
from neox_hf.training.save_schedule import SaveSchedule, is_scheduled
from neox_hf.training.schedules import learning_rate
from neox_hf.training.seeding import seed_process
from neox_hf.training.signals import StopRequest
from neox_hf.training.step_watch import EvaluationStopped, StepWatch
from neox_hf.training.throughput import Throughput, number_of_tokens, sustained_matmul_tflops
from neox_hf.training.trainer_checks import check_together

logger = logging.getLogger(__name__)

SECONDS_TO_FINISH_A_CHECKPOINT = 10.0
"""What a run that ends by an error gives the checkpoint in flight; a launcher waits 30 before it kills."""


class NeoXTrainer(Trainer):
    """Trains a GPT-NeoX model.

    Args:
        model: a causal language model, ours or stock; it is cast to the precision's weight dtype. None beside HF's
            `model_init`.
        args: see `NeoXTrainingArguments`.
        topology: where this process stands, connected; by default all of the world is data parallel. Where it splits
            the model, `model` is built with it and has in memory what this rank runs (see `first_model`).
        train_dataset: a `TokenStream` (endless, exact, resumable), or anything HF's Trainer takes.
        eval_dataset: batches from `neox_hf.data.evaluation_batches`, or anything HF's Trainer takes.
        workers: loader processes of each rank, for a `TokenStream`.
        publisher: pushes checkpoints to a Hub; given on rank 0 only.
        documents: files to write into every checkpoint, by relative path (the resolved recipe, versions).
        locked: the caller holds the output directory's `OutputLock`; otherwise `train` takes it.
        others: everything else HF's Trainer takes.
    """

    def __init__(
        self,
        model: nn.Module | None,
        args: NeoXTrainingArguments,
        *,
        topology: Topology | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        workers: int = 0,
        publisher: HubPublisher | None = None,
        documents: dict[str, str] | None = None,
        locked: bool = False,
        **others: Any,
    ) -> None:
        self.topology = topology or Topology.from_world(args.world_size, args.process_index)
        check_together(model, args, self.topology, train_dataset, others)
        if isinstance(train_dataset, TokenStream):
            args.ignore_data_skip = True  # its position is restored; any other data set HF fast-forwards
        if args.data_seed is None:
            args.data_seed = args.seed  # not that of this process, by which ranks would shuffle in ways of their own
        self.workers = workers
        self.publisher = publisher
        self.locked = locked
        self.loader: StreamLoader | None = None
        self.resumed: Checkpoint | None = None
        self.stop: StopRequest | None = None
        super().__init__(
            model=None if model is None else model_for_run(model, args),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **others,
        )
        self.fp8 = Fp8Run(self) if args.numeric.fp8 else None
        seed_process(args.seed, self.topology)
        self.engine = engine_for(self)
        self.guard = GradientGuard(args.effective_nan_policy, args.max_skipped_steps)
        self.run_state = RunState(self, documents or {})
        self.add_callback(SaveSchedule(args.save_schedule))
        self.step_watch = StepWatch(self)
        self.add_callback(self.step_watch)
        if self.fp8 is not None:
            self.add_callback(self.fp8)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        return model_for_run(super().call_model_init(trial), self.args)

    # Data

    def get_train_dataloader(self):
        if not isinstance(self.train_dataset, TokenStream):
            return super().get_train_dataloader()
        if self.loader is not None:
            self.loader.close()
        self.loader = StreamLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            workers=self.workers,
            pin_memory=self.args.device.type == "cuda",
            # HF takes all micro-batches of a step at once, to count their labels.
            ahead=self.args.gradient_accumulation_steps + 1,
        )
        return self.loader

    def get_eval_dataloader(self, eval_dataset: Any = None):
        batches = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(batches, str):
            batches = self.eval_dataset[batches]
        return batches if isinstance(batches, EvaluationBatches) else super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any):
        if isinstance(test_dataset, EvaluationBatches):
            return test_dataset
        return super().get_test_dataloader(test_dataset)

    def num_examples(self, dataloader: Any) -> int:
        if isinstance(dataloader, EvaluationBatches):
            return len(dataloader) * dataloader.batch_size * self.topology.data
        return super().num_examples(dataloader)

    def get_total_train_batch_size(self, args: NeoXTrainingArguments) -> int:
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.topology.data

    # One step

    def _prepare_input(self, data: Any) -> Any:
        # HF's copy waits for the device to finish what it was given before; out of pinned memory nobody need wait.
        if isinstance(data, Tensor) and data.is_pinned():
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        compile_layers(model, self.args, self.accelerator)
        if training:
            # By which Accelerate knows a model again: also one that an evaluation has brought to it, without replicas.
            vars(model).pop("_is_accelerate_prepared", None)
        wrapped = super()._wrap_model(model, training, dataloader)
        return self.engine.prepare(wrapped) if training else wrapped

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        return self.engine.step(model, inputs, num_items_in_batch)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        if batch_samples and NUM_ITEMS in batch_samples[0]:
            return batch_samples[0][NUM_ITEMS]
        counted = super()._get_num_items_in_batch(batch_samples, device)
        # HF adds up all processes, of which those of one replica have counted the same labels.
        return counted if counted is None else counted // self.topology.replica_size

    def _track_num_input_tokens(self, inputs: dict[str, Tensor]) -> None:
        tokens = number_of_tokens(inputs)
        self.throughput.count(tokens)
        if self.args.include_num_input_tokens_seen == "non_padding" and "attention_mask" in inputs:
            kept = self.accelerator.gather(inputs["attention_mask"].sum())
            self.state.num_input_tokens_seen += int(kept.sum()) // self.topology.replica_size
        else:
            self.state.num_input_tokens_seen += tokens * self.topology.data

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self.engine.clip_gradients(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        if grad_norm is None:  # nothing is clipped
            grad_norm = self.engine.norm_of_parts()
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.guard.must_skip(self.state.global_step + 1, norm):
            self.engine.drop_step()
        return norm

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: NeoXTrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        stock = Trainer.get_optimizer_cls_and_kwargs(args, model)
        kernels = getattr(getattr(model, "config", None), "kernels", "auto")
        return optimizer_class(args, stock, kernels)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        args = self.args
        if args.lr_decay_style is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        decay_steps = args.lr_decay_steps or num_training_steps
        schedule = functools.partial(
            learning_rate,
            style=args.lr_decay_style,
            peak=1.0,
            floor=args.min_lr / args.learning_rate if args.learning_rate else 0.0,
            warmup_steps=args.lr_warmup_fraction * decay_steps,
            decay_steps=decay_steps,
        )
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, schedule)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # Evaluation and figures

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        with self.throughput.paused():
            output = self.engine.evaluate(dataloader, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if (loss := output.metrics.get(f"{prefix}_loss")) is not None:
            # Beyond exp(700) a double overflows; such a model has no perplexity worth a number.
            output.metrics[f"{prefix}_perplexity"] = math.inf if loss >= 700 else math.exp(loss)
        return output

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            with self.step_watch.stoppable_evaluation():
                return super()._evaluate(*args, **kwargs)
        except EvaluationStopped:
            self.control.should_save = True
            self.control.should_training_stop = True
            return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # Under `save_strategy: best` this decides whether to save; an evaluation that was stopped always does.
        return super()._determine_best_metric(metrics, trial) if metrics else True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.throughput.read(self.topology.data))
            logs["consumed_tokens"] = self.state.num_input_tokens_seen
            if self.guard.skipped_steps:
                logs["skipped_steps"] = self.guard.skipped_steps
            if bad_rows := self._bad_rows():
                logs["bad_rows"] = bad_rows.total()
                logs.update({f"bad_rows/{kind}": count for kind, count in sorted(bad_rows.items())})
            if not math.isfinite(logs["loss"]):
                # HF subtracts the sum it has logged from itself, which would leave the NaN in it for ever.
                self._tr_loss.zero_()
        super().log(logs, start_time)

    def _bad_rows(self) -> Counter[str]:
        """Rows that all ranks have dropped so far, by class. Every rank calls it."""
        if self.loader is None or self.loader.stream.settings.bad_rows == "error":
            return Counter()
        mine = Counter(self.loader.bad_rows) if self.topology.heads_replica else Counter()
        if self.topology.heads_replica and isinstance(self.eval_dataset, EvaluationBatches):
            mine.update(self.eval_dataset.bad_rows)
        return sum(gather_object([mine]), Counter())

    def floating_point_ops(self, inputs: dict[str, Tensor]) -> float:
        return number_of_tokens(inputs) * self._flops_per_token

    @functools.cached_property
    def _flops_per_token(self) -> float:
        """This device's share of the work for one token of its replica's."""
        settings = getattr(self.train_dataset, "settings", None)
        length = settings.seq_length if settings is not None else self.model.config.max_position_embeddings
        return flops_per_token(self.model.config, length) / self.topology.replica_size

    @functools.cached_property
    def throughput(self) -> Throughput:
        """The stopwatch; measuring what 100 % MFU is takes half a second, once."""
        args = self.args
        dtype = torch.float32 if args.device.type == "cpu" or args.precision == "fp32" else torch.bfloat16
        peak = args.peak_tflops or sustained_matmul_tflops(args.device, dtype)
        return Throughput(self._flops_per_token, peak, args.device)

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As HF's, and `resume_from_checkpoint="latest"` (or True): the newest checkpoint that is whole, or none.

        Raises:
            CheckpointError: the named checkpoint is missing, damaged, or of another run.
            DataError: its stream is not this run's.
            DivergenceError: loss or gradients stopped being finite.
        """
        with ExitStack() as held:
            if not self.locked:
                from_first_rank(self.topology, lambda: self._take_output_dir(held))
            self.run_state.wait()  # an interrupt may have left one in flight
            self.resumed = checkpoint_to_resume(resume_from_checkpoint, Path(self.args.output_dir), self.topology)
            self.stop = held.enter_context(StopRequest(self.topology.world_size))
            try:
                return super().train(str(self.resumed.path) if self.resumed else None, *args, **kwargs)
            except DivergenceError:  # on every rank: what was saved before it is good
                self.run_state.wait()
                raise
            except BaseException:  # perhaps on this rank alone
                self.run_state.saver.let_finish(SECONDS_TO_FINISH_A_CHECKPOINT)
                raise

    def _finalize_training(self, *args: Any) -> TrainOutput:
        self.guard.settle()
        self.run_state.wait()
        if not self.stop_signal:
            self.run_state.keep_best_alone()
        # HF would delete what a stop has just saved, and what the schedule protects.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args)
        finally:
            self.args.save_total_limit = limit

    def _take_output_dir(self, held: ExitStack) -> None:
        held.callback(OutputLock(self.args.output_dir).acquire().release)

    @property
    def stop_signal(self) -> int:
        """The signal that ended training, or 0."""
        return self.stop.agreed if self.stop else 0

    def _init_training_state(self, max_steps: int, steps_per_epoch: int, epochs: int, *others: Any) -> tuple[int, int]:
        epochs_done, steps_done = super()._init_training_state(max_steps, steps_per_epoch, epochs, *others)
        self.state.compute_steps(self.args, max_steps)  # HF goes on with the intervals of the run that saved
        if self.state.global_step < max_steps:
            return epochs_done, steps_done
        # HF would give a run that has had all its steps one more.
        logger.warning("nothing is left to train: step %d of %d is done", self.state.global_step, max_steps)
        return epochs, 0

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None):
        if resume_from_checkpoint is not None and self.is_deepspeed_enabled:
            # Before DeepSpeed takes them: it would look for weights in a directory of its own making.
            self._load_from_checkpoint(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        self.engine.begin()
        if self.args.recompute == "selective":  # HF has switched on full blocks
            recompute_selectively(self.model, compiled=self.args.torch_compile)
        self.run_state.write_beside()
        due = self.state.global_step == 0 and is_scheduled(0, self.args.save_schedule)
        if due and not self.run_state.holds(self.resumed, 0):  # whose random states are yet to be read
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return prepared

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.guard.settle()
        self.store_flos()
        with self.throughput.paused():
            self.run_state.save()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._checkpoint_at(resume_from_checkpoint).load_weights(model or self.model, topology=self.topology)
        if self.fp8 is not None:
            self.fp8.forget()

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.run_state.load(self._checkpoint_at(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.run_state.load_rng(self._checkpoint_at(checkpoint))

    def _checkpoint_at(self, path: str) -> Checkpoint:
        """The checkpoint this run resumes from, which is verified already, or another one."""
        if self.resumed is not None and self.resumed.path == Path(path):
            return self.resumed
        return open_on_all_ranks(Path(path), self.topology)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model and its tokenizer so that `from_pretrained` loads them; each file atomically.

        Where no rank holds the whole model, every rank must call it.
        """
        path = Path(output_dir or self.args.output_dir)
        if self.topology.splits_model or self.is_deepspeed_enabled:
            write_final(self.model, self.processing_class, path, topology=self.topology)
        elif self.args.should_save:
            write_final(self.model, self.processing_class, path)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def publish(self, wait_seconds: float | None = None) -> PublishReport | None:
        """Push what lies in the output directory to `main`, and wait for all uploads; None without a publisher.

        What does not get through in time stays queued on disk, and the report says how to push it later.
        """
        if self.publisher is None:
            return None
        self.publisher.publish_final(Path(self.args.output_dir))
        return self.publisher.close(wait_seconds)
