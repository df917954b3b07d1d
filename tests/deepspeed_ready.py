"""Imported by the fork server: DeepSpeed, with the communication extension that it compiles at its first use.

Ranks that found it missing would all build it at once, and one that was killed meanwhile would leave its lock behind.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    import deepspeed.runtime.pipe.engine  # noqa: F401
