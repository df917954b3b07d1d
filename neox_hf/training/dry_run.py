"""What a recipe comes to, without building any of it."""

import math
import os
from itertools import pairwise

from neox_hf.config import dump_yaml
from neox_hf.modeling.accounting import parameter_count, rank_parameters
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.partition import stage_bounds
from neox_hf.modeling.settings import model_config
from neox_hf.parallel.topology import AXES, Topology
from neox_hf.training.recipe import Recipe, launched_world_size
from neox_hf.training.recipe_checks import known_tokens

NAMES_WIDTH = 17
RANKS_SHOWN = 4


def dry_run_report(recipe: Recipe) -> str:
    """The resolved recipe as YAML, then the layout, parameters, tokens, and the worlds that it can run in.

    Without a launcher the layout is that of the smallest world that fits.

    Raises:
        TopologyError: the recipe does not fit the world this process was launched in, or no world at all.
    """
    topology = recipe.topology(planned_world_size(recipe))
    config = known_config(recipe)
    samples, seq_length = recipe.samples_per_step(topology.world_size), recipe.data.seq_length
    tokens, steps = samples * seq_length, recipe.train.max_steps
    plan = {
        "parameters": parameters_in_words(recipe, config),
        "tokens per step": f"{tokens:,} = {samples:,} samples x {seq_length:,} tokens",
        "tokens in total": f"{tokens * steps:,} in {steps:,} steps",
        **_layout(recipe, topology, config),
        "worlds that fit": ", ".join(map(str, fitting_worlds(recipe))),
    }
    lines = [f"{name + ':':<{NAMES_WIDTH}}{value}" for name, value in plan.items()]
    return f"# resolved recipe\n{dump_yaml(recipe.resolved())}\n# plan\n" + "\n".join(f"# {line}" for line in lines)


def planned_world_size(recipe: Recipe) -> int:
    """The world that was launched, or the smallest that fits where there is no launcher."""
    if "WORLD_SIZE" in os.environ:
        return launched_world_size()
    return next(iter(fitting_worlds(recipe)), recipe.parallel.tensor * recipe.parallel.pipeline)


def fitting_worlds(recipe: Recipe, largest: int = 1024) -> list[int]:
    """World sizes up to `largest` in which streams, global batch and evaluation are dealt evenly."""
    total = recipe.train.global_batch_size
    common = recipe.data.streams
    if total is not None:
        common = math.gcd(common, total // recipe.train.per_device_train_batch_size)
    if recipe.evaluates:
        common = math.gcd(common, recipe.data.eval_samples // recipe.train.per_device_eval_batch_size)
    model_size = recipe.parallel.tensor * recipe.parallel.pipeline
    return [n * model_size for n in range(1, largest // model_size + 1) if common % n == 0]


def known_config(recipe: Recipe) -> GPTNeoXConfig | None:
    """The model's configuration, where the recipe alone decides it."""
    tokens = known_tokens(recipe.tokenizer)
    if recipe.model.pretrained is not None:
        return None
    if tokens is None and recipe.model.name is None and recipe.model.vocab_size is None:
        return None
    return model_config(recipe.model, tokens=tokens or 0, seq_length=recipe.data.seq_length)


def parameters_in_words(recipe: Recipe, config: GPTNeoXConfig | None) -> str:
    """The parameter count, or who decides it."""
    if config is not None:
        return f"{parameter_count(config):,} with a vocabulary of {config.vocab_size:,}"
    if recipe.model.pretrained is not None:
        return f"those of {recipe.model.pretrained}"
    return f"depend on the vocabulary of the {recipe.tokenizer.kind} tokenizer, which --dry-run does not load"


def _layout(recipe: Recipe, topology: Topology, config: GPTNeoXConfig | None) -> dict[str, str]:
    parallel = recipe.parallel
    micro, accumulation = recipe.train.per_device_train_batch_size, recipe.accumulation_steps(topology.world_size)
    layout = {
        "world": f"{topology}; {micro} samples at a time, {accumulation} times a step",
        "ZeRO": f"stage {parallel.effective_zero_stage}, optimizer offloaded to the host"
        if parallel.offload == "optimizer"
        else f"stage {parallel.effective_zero_stage}",
    }
    for axis in AXES:
        if getattr(topology, axis) > 1:
            groups = topology.axis_ranks(axis)
            layout[f"{axis} groups"] = f"{len(groups)} of {len(groups[0])}; the first is {_ranks(groups[0])}"
    if config is not None and parallel.splits_model:
        layout |= _stages(config, recipe)
    return layout


def _ranks(ranks: list[int]) -> str:
    if len(ranks) <= RANKS_SHOWN:
        return ", ".join(map(str, ranks))
    return f"{', '.join(map(str, ranks[: RANKS_SHOWN - 1]))} ... {ranks[-1]}"


def _stages(config: GPTNeoXConfig, recipe: Recipe) -> dict[str, str]:
    parallel = recipe.parallel
    bounds = stage_bounds(config, parallel.pipeline, parallel.partition)
    held = rank_parameters(config, tensor=parallel.tensor, pipeline=parallel.pipeline, partition=parallel.partition)
    return {
        f"stage {number}": f"layers {start} to {stop - 1}, {max(ranks):,} parameters on each rank"
        for number, ((start, stop), ranks) in enumerate(zip(pairwise(bounds), held, strict=True))
    }
