"""Find the quickest launches of the kernels, and algorithms of products, on this CUDA device, for a recipe's shapes.

python -m neox_hf.tune --config recipes/pythia_1.4b.yaml
python -m neox_hf.tune --config recipes/pythia_1.4b.yaml --micro-batch 8 --seconds 120 train.precision=pure_bf16

What is found is kept in $NEOX_HF_CACHE, else ~/.cache/neox_hf, and used by every later run on devices of that name.
"""

import sys
from collections.abc import Sequence

import torch

from neox_hf.errors import RecipeError
from neox_hf.kernels.fused_product import fused_choices_on
from neox_hf.kernels.launch_choice import launches_on
from neox_hf.kernels.launch_file import launch_path, read_entries, write_entries
from neox_hf.kernels.product_choice import choices_on
from neox_hf.training.command_line import RecipeParser, exit_on_user_error
from neox_hf.training.recipe import load_recipe
from neox_hf.tuning import (
    DeviceClock,
    Sizes,
    Tuning,
    compute_products,
    layer_work,
    product_table,
    search,
    step_work,
    table,
)
from neox_hf.tuning.inputs import Random

USAGE = (
    "python -m neox_hf.tune --config A.yaml [B.yaml ...] [-d DIR] [--micro-batch N] [--seconds S] "
    "[section.key=value ...]"
)
SECONDS = 300.0


@exit_on_user_error()
def main(argv: Sequence[str]) -> int:
    """Returns the exit status; a user's mistake ends the process with 2."""
    parser = RecipeParser(USAGE)
    parser.add_argument("--micro-batch", type=int, help="samples; train.per_device_train_batch_size if not given")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which no other kernel is begun")
    options, overrides = parser.parse_with_overrides(argv)
    if options.micro_batch is not None:
        overrides = (*overrides, f"train.per_device_train_batch_size={options.micro_batch}")
    device = cuda_device()
    sizes = Sizes.of(load_recipe(options.config, options.directory, overrides))
    tuning = search([*step_work(sizes), *layer_work(sizes)], launches_on(device), DeviceClock(device), options.seconds)
    print(table(tuning))
    keep(tuning, torch.cuda.get_device_name(device))
    compute_products(sizes, Random(device))
    for choices, plain in ((choices_on(device), "torch"), (fused_choices_on(device), "apart")):
        if choices is not None:
            print(f"{product_table(choices.measured, plain)}\nin: {choices.file.path}")
    return 0


def cuda_device() -> torch.device:
    """The current CUDA device.

    Raises:
        RecipeError: there is none.
    """
    if not torch.cuda.is_available():
        raise RecipeError(
            "kernels are tuned on the CUDA device that they will run on, and torch finds none here; run this there. "
            "Without CUDA there is nothing to tune: the torch references compute"
        )
    return torch.device("cuda", torch.cuda.current_device())


def keep(tuning: Tuning, device_name: str) -> None:
    """Add what was found to the device's file.

    Raises:
        RecipeError: it cannot be written.
    """
    path = launch_path(device_name)
    try:
        write_entries(path, device_name, tuning.merged_into(read_entries(path)))
    except OSError as error:
        raise RecipeError(f"cannot write {path}: {error.strerror}; set NEOX_HF_CACHE to a folder that can") from error
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
