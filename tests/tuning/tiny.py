"""Sizes of a model that is tuned in no time."""

import torch

from neox_hf.tuning import Sizes

TINY = Sizes(
    batch=1,
    sequence=6,
    hidden=24,
    inner=40,
    heads=3,
    head_size=8,
    rotary=4,
    vocabulary=50,
    form="erf",
    dropout=0.0,
    attention_bias=True,
    parallel_residual=True,
    documents=False,
    stream=torch.bfloat16,
    product=torch.bfloat16,
    gradient=torch.float32,
    master=True,
    parameters=3000,
)
