"""What a fork server does so that a rank starts at once: it imports, and fills caches, which its ranks inherit."""

import atexit
import gc
import importlib
import os
import platform
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

# torch would ask the driver for devices, and no fork of a process that has done so can use them.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import torch

from neox_hf.training.launch_environment import prepare_deepspeed_on_cpu
from tests.gloo import COVERAGE_FILE

if not torch.cuda.is_available():
    prepare_deepspeed_on_cpu()

# A run imports these on its way.
for name in (
    "neox_hf.training.pretraining",
    "neox_hf.training.pipeline_engine",
    "neox_hf.training.zero",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # compiles a function, which takes the compiler
    "deepspeed.utils.pin_memory",
    "matplotlib.pyplot",
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "tests.checkpoint.dying_writer",
    *(["coverage", "coverage.sqldata"] if COVERAGE_FILE in os.environ else []),
):
    importlib.import_module(name)


def fill_caches() -> None:
    """Work that every run would do once and for all."""
    import deepspeed.ops
    from accelerate.utils import imports

    from neox_hf.checkpoint.hub.loss_curve import plot_loss_curve
    from neox_hf.data.words import word_pattern

    word_pattern()
    platform.processor()
    if not torch.cuda.is_available():
        # DeepSpeed finds out what it could compile, for which it imports setuptools and starts the compiler.
        _ = deepspeed.ops.__compatible_ops__
    # Accelerate reads the metadata of DeepSpeed's package at each step.
    imports._is_package_available = cache(imports._is_package_available)
    with TemporaryDirectory() as folder:
        plot_loss_curve(
            [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval_loss": 1.0}], Path(folder) / "curve.png"
        )


fill_caches()

# A collection in a rank would walk all that was imported, and by touching it copy it from the fork server's memory.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)  # what was never freed would be reported as leaked
