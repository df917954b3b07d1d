"""What a recipe comes to, without building any of it."""

import math

from neox_hf.config import dump_yaml
from neox_hf.modeling.accounting import parameter_count
from neox_hf.modeling.settings import model_config
from neox_hf.training.recipe import Recipe, launched_world_size
from neox_hf.training.recipe_checks import known_tokens


def parameters_in_words(recipe: Recipe) -> str:
    """The parameter count, or who decides it."""
    if recipe.model.pretrained is not None:
        return f"those of {recipe.model.pretrained}"
    tokens = known_tokens(recipe.tokenizer)
    if tokens is None and recipe.model.name is None and recipe.model.vocab_size is None:
        return f"depend on the vocabulary of the {recipe.tokenizer.kind} tokenizer, which --dry-run does not load"
    config = model_config(recipe.model, tokens=tokens or 0, seq_length=recipe.data.seq_length)
    return f"{parameter_count(config):,} with a vocabulary of {config.vocab_size:,}"


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


def dry_run_report(recipe: Recipe) -> str:
    """The resolved recipe as YAML, then parameters, tokens, and the worlds that it can run in.

    Raises:
        TopologyError: the recipe does not fit the world this process was launched in.
    """
    world = launched_world_size()
    samples, seq_length = recipe.samples_per_step(world), recipe.data.seq_length
    tokens, steps = samples * seq_length, recipe.train.max_steps
    micro, accumulation = recipe.train.per_device_train_batch_size, recipe.accumulation_steps(world)
    plan = {
        "parameters": parameters_in_words(recipe),
        "tokens per step": f"{tokens:,} = {samples:,} samples x {seq_length:,} tokens",
        "tokens in total": f"{tokens * steps:,} in {steps:,} steps",
        "this world": f"{world} = {recipe.topology(world).data} data x {recipe.parallel.pipeline} pipeline "
        f"x {recipe.parallel.tensor} tensor; {micro} samples at a time, {accumulation} times a step",
        "worlds that fit": ", ".join(map(str, fitting_worlds(recipe))),
    }
    lines = [f"{name + ':':<17}{value}" for name, value in plan.items()]
    return f"# resolved recipe\n{dump_yaml(recipe.resolved())}\n# plan\n" + "\n".join(f"# {line}" for line in lines)
