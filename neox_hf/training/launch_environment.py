"""What an `accelerate config` of the host would change in a run, refused: the recipe alone decides it."""

import os

from neox_hf.errors import RecipeError

YES = ("1", "true", "t", "yes", "y", "on")
"""What Accelerate reads as yes, in any case."""

ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "parallel.zero_stage decides what is sharded",
    "ACCELERATE_USE_FSDP": "parallel.zero_stage decides what is sharded",
    "ACCELERATE_USE_MEGATRON_LM": "parallel.tensor and parallel.pipeline decide how the model is split",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallel decides how the model is split",
}
COMPILER = "ACCELERATE_DYNAMO_BACKEND"
WAY_OUT = (
    "the recipe decides a run, not the host: launch with `accelerate launch --config_file FILE` where FILE leaves "
    "it out, or with torchrun"
)


def check_environment(compiles: bool) -> None:
    """Refuse an engine or a compiler that `accelerate launch` has put into the environment.

    compiles: whether the recipe itself asks for `torch.compile`; transformers then sets the compiler's variables.

    Raises:
        RecipeError: with the section that decides it, and the way out.
    """
    for name, owner in ENGINES.items():
        if os.environ.get(name, "").lower() in YES:
            raise RecipeError(f"{name} = {os.environ[name]} in the environment: {owner}; {WAY_OUT}")
    backend = os.environ.get(COMPILER, "no")
    if not compiles and backend.lower() != "no":
        raise RecipeError(
            f"{COMPILER} = {backend} in the environment: train.torch_compile decides what is compiled; {WAY_OUT}"
        )
