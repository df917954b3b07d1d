"""What a fork server imports so that a rank starts at once.

DeepSpeed's extension for gloo is built here too: ranks that found it missing would all build it at once, and one that
was killed meanwhile would leave its lock behind.
"""

import gc
import importlib

import torch

from neox_hf.training.launch_environment import prepare_deepspeed_on_cpu

if not torch.cuda.is_available():
    prepare_deepspeed_on_cpu()
    from deepspeed.accelerator import get_accelerator

    get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)

# A run imports these on its way.
for name in (
    "neox_hf.training.pretraining",
    "neox_hf.training.pipeline_engine",
    "neox_hf.training.zero",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # compiles a function, which takes the compiler
    "matplotlib.pyplot",
    "tests.checkpoint.dying_writer",
):
    importlib.import_module(name)

# A collection in a rank would walk all that was imported, and by touching it copy it from the fork server's memory.
gc.collect()
gc.freeze()
