"""The recipe: everything that decides a run, read from YAML files and overrides, checked before anything is built."""

import dataclasses
import os
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
from neox_hf.training.launch_environment import check_environment
from neox_hf.training.recipe_limits import limit_problems
from neox_hf.training.train_section import REFUSED, TrainSettings

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

    def data_size(self, world_size: int) -> int:
        """Replicas of the model among `world_size` processes.

        Raises:
            TopologyError: the model-parallel sizes do not divide the world, or the replicas cannot share the streams,
                the global batch or the evaluation evenly.
        """
        sizes = {"tensor": self.parallel.tensor, "pipeline": self.parallel.pipeline}
        replicas = Topology.from_world(world_size, 0, **sizes).data
        if self.data.streams % replicas:
            raise TopologyError(
                f"data.streams = {self.data.streams} cannot be dealt evenly to {replicas} data-parallel ranks; "
                f"launch a number of processes that divides it, or set data.streams to a multiple of {replicas}"
            )
        self._check_global_batch(replicas)
        if self.evaluates:
            self._check_evaluation(replicas)
        return replicas

    def _check_global_batch(self, replicas: int) -> None:
        total = self.train.global_batch_size
        share = self.train.per_device_train_batch_size * replicas
        if total is not None and total % share:
            raise TopologyError(
                f"train.global_batch_size = {total} is no multiple of train.per_device_train_batch_size x "
                f"{replicas} data-parallel ranks = {share}; change one of the three"
            )
        if total is not None and self.train.gradient_accumulation_steps not in (1, total // share):
            raise TopologyError(
                f"train.gradient_accumulation_steps = {self.train.gradient_accumulation_steps}, but "
                f"train.global_batch_size = {total} takes {total // share} with {replicas} data-parallel ranks; "
                "leave the accumulation out, it follows from the world"
            )

    def _check_evaluation(self, replicas: int) -> None:
        count, step = self.data.eval_samples, self.train.per_device_eval_batch_size * replicas
        if count % step:
            nearest = sorted({max(step, count // step * step), -(-count // step) * step})
            raise TopologyError(
                f"data.eval_samples = {count} is no multiple of train.per_device_eval_batch_size x "
                f"{replicas} data-parallel ranks = {step}; set it to {' or '.join(map(str, nearest))}"
            )

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches that each rank takes in one optimizer step."""
        share = self.train.per_device_train_batch_size * self.data_size(world_size)
        total = self.train.global_batch_size
        return self.train.gradient_accumulation_steps if total is None else total // share

    def samples_per_step(self, world_size: int) -> int:
        """Samples of `data.seq_length` tokens in one optimizer step over all ranks."""
        micro = self.train.per_device_train_batch_size * self.data_size(world_size)
        return micro * self.accumulation_steps(world_size)

    def training_arguments(self) -> NeoXTrainingArguments:
        """Construct the arguments, which starts the process group where there is a launcher.

        Raises:
            RecipeError: HF refuses a combination of `train:` values, or the environment contradicts the recipe.
            TopologyError: the recipe does not fit the world, or the world is not the one that was launched.
        """
        check_environment(self.compiles)
        launched = launched_world_size()
        values = {f.name: getattr(self.train, f.name) for f in dataclasses.fields(self.train)}
        del values["global_batch_size"]
        values["gradient_accumulation_steps"] = self.accumulation_steps(launched)
        if self.train.save_schedule != "every":
            values["save_strategy"] = "no"  # the schedule's own callback asks for its steps
        # Without it HF takes a CPU host for a world of one and every rank trains alone in the same folder.
        use_cpu = not torch.cuda.is_available()
        if use_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, imported by Accelerate, warns of its guess
        try:
            arguments = NeoXTrainingArguments(**values, use_cpu=use_cpu)
        except ValueError as error:
            raise RecipeError(f"train: {error}") from error
        check_world(arguments, launched)
        return arguments

    def resolved(self) -> dict[str, Any]:
        """Every section with every value, as plain data; written as YAML it is a recipe that says the same."""
        return dataclasses.asdict(self)


def check_world(arguments: NeoXTrainingArguments, launched: int) -> None:
    """Refuse a world that is not the one a launcher started, or one process that drives several GPUs.

    Raises:
        TopologyError: with the command that works.
    """
    if arguments.world_size != launched:
        raise TopologyError(
            f"{launched} processes were launched, but this one is in a world of {arguments.world_size}: each would "
            f"train alone; launch with `torchrun --nproc_per_node {launched} recipes/pretrain.py --config ...` or with "
            f"`accelerate launch --multi_gpu --num_processes {launched} recipes/pretrain.py --config ...`"
        )
    if arguments.n_gpu > 1:
        raise TopologyError(
            f"one process was started on a host with {arguments.n_gpu} GPUs; launch one for each with "
            f"`accelerate launch --multi_gpu --num_processes {arguments.n_gpu} recipes/pretrain.py --config ...`, "
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
    yield from checks.parallel_problems(recipe.parallel)
    yield from checks.train_problems(recipe.train, recipe.data)
    yield from checks.hub_problems(recipe.hub)
