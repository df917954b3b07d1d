"""Imported by the fork server: DeepSpeed, with the communication extension that it compiles at its first use.

Ranks that found it missing would all build it at once, and one that was killed meanwhile would leave its lock behind.
"""

import torch

from neox_hf.training.launch_environment import prepare_deepspeed_on_cpu

if not torch.cuda.is_available():
    prepare_deepspeed_on_cpu()
    from deepspeed.accelerator import get_accelerator

    get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    import deepspeed.runtime.pipe.engine  # noqa: F401
