"""The recipe: everything that decides a run, read from YAML files and overrides, checked before anything is built."""

import dataclasses
import logging
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from neox_hf.checkpoint.settings import HubSettings
from neox_hf.config import Problem, build, merge, read_file, read_override, report
from neox_hf.data.settings import DataSettings, TokenizerSettings
from neox_hf.errors import RecipeError, TopologyError
from neox_hf.modeling.settings import ModelSettings
from neox_hf.parallel.settings import ParallelSettings
from neox_hf.parallel.topology import Topology
from neox_hf.training import recipe_checks as checks
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.deepspeed_config import deepspeed_config
from neox_hf.training.graphs import graph_problems
from neox_hf.training.launch_environment import (
    Decisions,
    check_one_process_was_meant,
    do_without_compiled_reduction,
    launch_command,
    prepare_deepspeed_on_cpu,
    settle_environment,
)
from neox_hf.training.precision import precision_here
from neox_hf.training.recipe_limits import limit_problems
from neox_hf.training.recipe_parallel import parallel_problems
from neox_hf.training.train_section import REFUSED, TrainSettings

logger = logging.getLogger(__name__)

SHORTHANDS = {"model": "name"}
"""`model: pythia-160m` is `model: {name: pythia-160m}`."""


def launched_world_size() -> int:
    """Processes that a launcher says it started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The sections of a run. Made by `load_recipe`, which is what checks them; docs/recipe.md lists every key."""

    model: ModelSettings = field(default_factory=ModelSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    data: DataSettings = field(default_factory=DataSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    hub: HubSettings = field(default_factory=HubSettings)

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates at all."""
        return self.train.eval_strategy != "no" or self.train.eval_on_start

    @property
    def compiles(self) -> bool:
        """Whether the model is compiled; transformers takes a backend or a mode for a yes."""
        train = self.train
        return train.torch_compile or train.torch_compile_backend is not None or train.torch_compile_mode is not None

    def topology(self, world_size: int, rank: int = 0) -> Topology:
        """Where `rank` stands among `world_size` processes; not connected.

        Raises:
            TopologyError: the model-parallel sizes do not divide the world, or the replicas cannot share the streams,
                the global batch or the evaluation evenly.
        """
        parallel = self.parallel
        needed = parallel.tensor * parallel.pipeline
        if world_size < needed:
            raise TopologyError(
                f"parallel.pipeline = {parallel.pipeline} x parallel.tensor = {parallel.tensor} takes {needed} "
                f"processes, or a multiple of that, and the world has {world_size}; launch with "
                f"{launch_command(needed)}. Without --multi_gpu, accelerate starts one process on a host without GPUs"
            )
        topology = Topology.from_world(
            world_size,
            rank,
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            sequence=parallel.sequence,
            copies=parallel.messages == "auto",
        )
        if self.data.streams % topology.data:
            raise TopologyError(
                f"data.streams = {self.data.streams} cannot be dealt evenly to {topology.data} data-parallel ranks "
                f"(world of {topology}); launch a number of processes for which it can, or set data.streams to a "
                f"multiple of {topology.data}"
            )
        self._check_global_batch(topology)
        if self.evaluates:
            self._check_evaluation(topology)
        return topology

    def _check_global_batch(self, topology: Topology) -> None:
        total = self.train.global_batch_size
        share = self.train.per_device_train_batch_size * topology.data
        if total is not None and total % share:
            raise TopologyError(
                f"train.global_batch_size = {total} is no multiple of train.per_device_train_batch_size x "
                f"{topology.data} data-parallel ranks = {share} (world of {topology}); change one of the three"
            )
        if total is not None and self.train.gradient_accumulation_steps not in (1, total // share):
            raise TopologyError(
                f"train.gradient_accumulation_steps = {self.train.gradient_accumulation_steps}, but "
                f"train.global_batch_size = {total} takes {total // share} with {topology.data} data-parallel ranks "
                f"(world of {topology}); leave the accumulation out, it follows from the world"
            )

    def _check_evaluation(self, topology: Topology) -> None:
        count, step = self.data.eval_samples, self.train.per_device_eval_batch_size * topology.data
        if count % step:
            nearest = sorted({max(step, count // step * step), -(-count // step) * step})
            raise TopologyError(
                f"data.eval_samples = {count} is no multiple of train.per_device_eval_batch_size x {topology.data} "
                f"data-parallel ranks = {step} (world of {topology}); set it to {' or '.join(map(str, nearest))}"
            )

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches that each rank takes in one optimizer step."""
        share = self.train.per_device_train_batch_size * self.topology(world_size).data
        total = self.train.global_batch_size
        return self.train.gradient_accumulation_steps if total is None else total // share

    def samples_per_step(self, world_size: int) -> int:
        """Samples of `data.seq_length` tokens in one optimizer step over all ranks."""
        micro = self.train.per_device_train_batch_size * self.topology(world_size).data
        return micro * self.accumulation_steps(world_size)

    def training_arguments(self) -> NeoXTrainingArguments:
        """Construct the arguments, which starts the process group where there is a launcher.

        Raises:
            RecipeError: HF refuses a combination of `train:` values, or the environment contradicts the recipe.
            TopologyError: the recipe does not fit the world, or the world is not the one that was launched.
        """
        on_cuda, launched = torch.cuda.is_available(), launched_world_size()
        check_one_process_was_meant(on_cuda, self.parallel.tensor * self.parallel.pipeline)
        deepspeed = self.deepspeed_config(launched)
        settle_environment(self._decisions(launched, deepspeed), on_cuda)
        values = {f.name: getattr(self.train, f.name) for f in dataclasses.fields(self.train)}
        del values["global_batch_size"]
        values["gradient_accumulation_steps"] = self.accumulation_steps(launched)
        values["deepspeed"] = deepspeed
        if not on_cuda:
            prepare_deepspeed_on_cpu()
        if deepspeed is not None:
            self._tell_of_deepspeed()
            be_a_world_of_one(launched)
            if not on_cuda:
                do_without_compiled_reduction()
        try:
            # Without use_cpu HF takes a CPU host for a world of one and every rank trains alone in the same folder.
            arguments = NeoXTrainingArguments(**values, use_cpu=not on_cuda)
        except ValueError as error:
            raise RecipeError(f"train: {error}") from error
        check_world(arguments, launched)
        return arguments

    def deepspeed_config(self, world_size: int) -> dict[str, Any] | None:
        """DeepSpeed's configuration in a world of that size; None where the run does without."""
        accumulation = self.accumulation_steps(world_size)
        return deepspeed_config(self.train, self.parallel, self.topology(world_size), accumulation)

    def _decisions(self, world_size: int, deepspeed: dict[str, Any] | None) -> Decisions:
        parallel = self.parallel
        return Decisions(
            compiles=self.compiles,
            precision=precision_here(self.train.precision),
            zero_stages=(parallel.zero_stage, parallel.effective_zero_stage),
            offload=parallel.offload,
            accumulation=self.accumulation_steps(world_size),
            max_grad_norm=self.train.max_grad_norm,
            samples=self.samples_per_step(world_size),
            deepspeed=deepspeed,
        )

    def _tell_of_deepspeed(self) -> None:
        parallel = self.parallel
        if parallel.effective_zero_stage != parallel.zero_stage:
            logger.info(
                "parallel.zero_stage = 0 runs as 1: with tensor or pipeline parallelism the optimizer's state is "
                "always sharded over the data-parallel ranks"
            )

    def resolved(self) -> dict[str, Any]:
        """Every section with every value, as plain data; written as YAML it is a recipe that says the same."""
        return dataclasses.asdict(self)


def be_a_world_of_one(launched: int) -> None:
    """Tell DeepSpeed what a launcher would have, where there was none: it starts a process group even for one."""
    if launched > 1 or "RANK" in os.environ:
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def check_world(arguments: NeoXTrainingArguments, launched: int) -> None:
    """Refuse a world that is not the one a launcher started, or one process that drives several GPUs.

    Raises:
        TopologyError: with the command that works.
    """
    if arguments.world_size != launched:
        raise TopologyError(
            f"{launched} processes were launched, but this one is in a world of {arguments.world_size}: each would "
            f"train alone; launch with `torchrun --nproc_per_node {launched} recipes/pretrain.py --config ...` or with "
            f"{launch_command(launched)}"
        )
    if arguments.n_gpu > 1:
        raise TopologyError(
            f"one process was started on a host with {arguments.n_gpu} GPUs; launch one for each with "
            f"{launch_command(arguments.n_gpu)}, "
            "or choose a single GPU with CUDA_VISIBLE_DEVICES=0"
        )


def load_recipe(paths: Sequence[str], directory: str | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """Read files left to right, then the overrides `section.key=value`, and check the result.

    directory: the folder that the paths are relative to.

    Raises:
        RecipeError: a file cannot be read, or a key, type or value is wrong; all such mistakes in one message.
    """
    documents = [read_file(path, directory) for path in paths] + [read_override(text) for text in overrides]
    document = merge(documents, SHORTHANDS)
    recipe = build(Recipe, document, {f"train.{key}": reason for key, reason in REFUSED.items()})
    report(list(_problems(recipe)), document)
    return recipe


def _problems(recipe: Recipe) -> Iterable[Problem]:
    sections = {section.name: getattr(recipe, section.name) for section in dataclasses.fields(recipe)}
    yield from limit_problems(sections)
    yield from checks.model_problems(recipe.model, recipe.data, recipe.tokenizer)
    yield from checks.tokenizer_problems(recipe.tokenizer)
    yield from checks.data_problems(recipe.data, evaluates=recipe.evaluates)
    yield from parallel_problems(recipe.parallel, recipe.model, recipe.data, recipe.train)
    yield from graph_problems(recipe.train, recipe.model, recipe.parallel)
    yield from checks.train_problems(recipe.train, recipe.data)
    if not recipe.parallel.needs_deepspeed:
        yield from checks.master_weights_problems(recipe.train)
    yield from checks.fp8_problems(recipe.train, recipe.model, recipe.compiles)
    yield from checks.hub_problems(recipe.hub)
