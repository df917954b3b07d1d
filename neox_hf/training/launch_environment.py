"""What `accelerate launch` and a host's `accelerate config` put into the environment, held against the recipe.

The recipe alone decides a run. A launcher may say the same things, in flags or in a configuration file; it then must
say the same. What was compared is taken out of the environment, where Accelerate would read it again and do what it
says behind the recipe's back.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from neox_hf.errors import RecipeError, TopologyError

YES = ("1", "true", "t", "yes", "y", "on")
"""What Accelerate reads as yes, in any case."""

ENGINES = {
    "ACCELERATE_USE_FSDP": "parallel.zero_stage decides what is sharded",
    "ACCELERATE_USE_MEGATRON_LM": "parallel.tensor and parallel.pipeline decide how the model is split",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallel decides how the model is split",
}
"""What a recipe cannot say, each with what it says instead."""

COMPILER = "ACCELERATE_DYNAMO_BACKEND"
PRECISION = "ACCELERATE_MIXED_PRECISION"
CPU = "ACCELERATE_USE_CPU"
DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
CONFIG_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
ZERO_STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
OFFLOAD_OPTIMIZER = "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"
OFFLOAD_WEIGHTS = "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
CLIPPING = "ACCELERATE_GRADIENT_CLIPPING"

NOT_CHOSEN = {PRECISION: "no", ACCUMULATION: "1", COMPILER: "no"}
"""What Accelerate writes where nobody chose anything."""

SETTLED = (CPU, DEEPSPEED, ACCUMULATION, CLIPPING, "ACCELERATE_CONFIG_DS_FIELDS")
SETTLED_PREFIX = "ACCELERATE_DEEPSPEED_"
"""What is taken out. The precision stays: `NeoXTrainingArguments` overrules it, and by it a process knows later that
`accelerate launch` has started it."""

SAME_PRECISION = {"bf16": ("bf16", "amp", "pure_bf16", "fp8"), "fp16": ("fp16",), "fp8": ("fp8",)}
"""Recipes that a launcher's `--mixed_precision` agrees with."""

OF_NO_CONSEQUENCE = ("steps_per_print", "wall_clock_breakdown")
"""Keys of a DeepSpeed configuration file that are about printing."""

WAY_OUT = (
    "the recipe decides a run, not the host: change the recipe, or leave this out of the flags of `accelerate launch` "
    "and of the file that `accelerate config` wrote (`--config_file FILE` takes another), or launch with torchrun"
)
MPI_WORLDS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What a recipe has decided of all that a launcher can be told.

    zero_stages: stages that a launcher may name: the recipe's and, where another one runs, that one too.
    offload: as in `parallel:`. samples: in one step. deepspeed: its configuration; None where it has no part.
    """

    compiles: bool
    precision: str
    zero_stages: tuple[int, ...]
    offload: str
    accumulation: int
    max_grad_norm: float
    samples: int
    deepspeed: Mapping[str, Any] | None


def settle_environment(decided: Decisions, on_cuda: bool) -> None:
    """Compare the environment with the recipe and take out what has been compared.

    Raises:
        RecipeError: they disagree; every point at once, with the way out.
    """
    disagreements = [*_engines(), *_compiler(decided), *_device(on_cuda), *_settings(decided), *_file(decided)]
    if len(disagreements) == 1:
        raise RecipeError(f"in the environment, {disagreements[0]}; {WAY_OUT}")
    if disagreements:
        raise RecipeError("in the environment,\n  " + "\n  ".join(disagreements) + f"\n{WAY_OUT}")
    for name in [*os.environ]:
        if name in SETTLED or name.startswith(SETTLED_PREFIX):
            del os.environ[name]


def prepare_deepspeed_on_cpu() -> None:
    """Name the device to DeepSpeed before it is imported: on a host without CUDA it would warn of its guess."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def do_without_compiled_reduction() -> None:
    """Keep DeepSpeed from compiling its all-reduce over shared memory when a CPU rank joins the process group.

    Only its inference engine calls it, and a host's first run would wait most of a minute for a C++ compiler.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_one_process_was_meant(on_cuda: bool, needed: int) -> None:
    """Refuse to be the single process that Accelerate starts on a CPU host where it was asked for several.

    needed: the processes that the recipe takes at least.

    Raises:
        TopologyError: with the command that works.
    """
    alone = "WORLD_SIZE" not in os.environ and not any(name in os.environ for name in MPI_WORLDS)
    # Of all that it does for several processes, this much is left of it when it starts one.
    asked_for_several = PRECISION in os.environ and "MASTER_ADDR" in os.environ
    if alone and asked_for_several and not on_cuda:
        raise TopologyError(
            "accelerate was asked for several processes and started one, as it does on a host without GPUs; launch "
            f"with {launch_command(max(2, needed))}, or, where one process is meant, without --num_processes and with "
            "MASTER_ADDR unset"
        )


def launch_command(processes: int) -> str:
    """A command that starts that many processes on any host."""
    return f"`accelerate launch --multi_gpu --num_processes {processes} recipes/pretrain.py --config ...`"


def _chosen(name: str) -> str | None:
    """The value that somebody chose, in lower case."""
    value = os.environ.get(name, "").lower()
    return None if value in ("", NOT_CHOSEN.get(name)) else value


def _engines() -> Iterator[str]:
    for name, owner in ENGINES.items():
        if os.environ.get(name, "").lower() in YES:
            yield f"{name} = {os.environ[name]}: {owner}"


def _compiler(decided: Decisions) -> Iterator[str]:
    # Where the recipe compiles, transformers sets the compiler's variables itself.
    if not decided.compiles and _chosen(COMPILER):
        yield f"{COMPILER} = {os.environ[COMPILER]}: train.torch_compile decides what is compiled"


def _device(on_cuda: bool) -> Iterator[str]:
    if on_cuda and _chosen(CPU) in YES:
        yield f"{CPU} = {os.environ[CPU]}, but there is a CUDA device; to train on the CPU, set CUDA_VISIBLE_DEVICES="


def _settings(decided: Decisions) -> Iterator[str]:
    """Single values, each with the key of the recipe that decides it and the values that agree."""
    stage, runs = decided.zero_stages[0], decided.zero_stages[-1]
    as_run = f", which runs as {runs}" if runs != stage else ""
    offloads = "cpu" if decided.offload == "optimizer" else "none"
    rows = [
        (ZERO_STAGE, decided.zero_stages, f"parallel.zero_stage = {stage}{as_run}"),
        (OFFLOAD_OPTIMIZER, (offloads,), f"parallel.offload = {decided.offload}"),
        (OFFLOAD_WEIGHTS, ("none",), "weights stay on the device; parallel.offload = optimizer moves the rest"),
        (ACCUMULATION, (decided.accumulation,), f"a step of this recipe takes {decided.accumulation}"),
        (CLIPPING, (decided.max_grad_norm,), f"train.max_grad_norm = {decided.max_grad_norm}"),
    ]
    for name, agreeing, owner in rows:
        value = _chosen(name)
        if value is not None and not any(_same(value, one) for one in agreeing):
            yield f"{name} = {os.environ[name]}, but {owner}"
    precision = _chosen(PRECISION)
    if precision is not None and decided.precision not in SAME_PRECISION.get(precision, ()):
        yield f"{PRECISION} = {os.environ[PRECISION]}, but train.precision = {decided.precision}"


def _same(text: str, value: float | str) -> bool:
    if isinstance(value, str):
        return text == value
    try:
        return float(text) == value
    except ValueError:
        return False


def _file(decided: Decisions) -> Iterator[str]:
    path = os.environ.get(CONFIG_FILE)
    if path is None:
        return
    if decided.deepspeed is None:
        yield f"{CONFIG_FILE} = {path}, but parallel.zero_stage = 0 trains without DeepSpeed"
        return
    try:
        with open(path, encoding="utf-8") as file:
            theirs = json.load(file)
    except (OSError, ValueError) as error:
        yield f"{CONFIG_FILE} = {path}, which cannot be read: {error}"
        return
    ours = {**decided.deepspeed, "train_batch_size": decided.samples}
    differences = list(_differences(theirs, ours, ""))
    if differences:
        yield f"{CONFIG_FILE} = {path}, where {'; '.join(differences)}"


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Values of a DeepSpeed configuration file that are not the recipe's."""
    for key, value in theirs.items():
        if value == "auto" or key in OF_NO_CONSEQUENCE:
            continue
        own = ours.get(key)
        if isinstance(value, Mapping):
            if value.get("enabled") is not False or own is not None:
                yield from _differences(value, own if isinstance(own, Mapping) else {}, f"{prefix}{key}.")
        elif key not in ours and value not in (False, None, "none"):
            yield f"{prefix}{key} = {json.dumps(value)} has no place in a recipe"
        elif key in ours and value != own:
            yield f"{prefix}{key} = {json.dumps(value)} and the recipe comes to {json.dumps(own)}"
