"""Packages that a value of a recipe needs and that are not among ours."""

from importlib.util import find_spec

from transformers.training_args import OptimizerNames

BITSANDBYTES = ("bitsandbytes", "bitsandbytes")
TORCHAO = ("torchao", "torchao")

OF_OPTIMIZER = (
    ("adamw_torch_4bit", *TORCHAO),
    ("adamw_torch_8bit", *TORCHAO),
    ("adamw_torch_xla", "torch_xla", "torch-xla"),
    ("adamw_torch_npu", "torch_npu", "torch-npu"),
    ("adamw_anyprecision", "torchdistx", "torchdistx"),
    ("galore_", "galore_torch", "galore-torch"),
    ("apollo_", "apollo_torch", "apollo-torch"),
    ("lomo", "lomo_optim", "lomo-optim"),
    ("adalomo", "lomo_optim", "lomo-optim"),
    ("grokadamw", "grokadamw", "grokadamw"),
    ("schedule_free_", "schedulefree", "schedulefree"),
    ("stable_adamw", "optimi", "torch-optimi"),
    ("ademamix", *BITSANDBYTES),
    ("adamw_bnb_", *BITSANDBYTES),
    ("adamw_8bit", *BITSANDBYTES),
    ("lion_", *BITSANDBYTES),
    ("paged_", *BITSANDBYTES),
    ("rmsprop_bnb", *BITSANDBYTES),
)
"""How names of optimizers begin, the module that these need, and what pip calls it. The rest are in torch or ours."""

OF_ATTENTION = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
    "flash_attention_4": ("flash_attn", "flash-attn-4"),
}


def missing_for_optimizer(name: str) -> str | None:
    """The package to install for an optimizer of transformers, or None when nothing is missing."""
    assert name in {known.value for known in OptimizerNames}, name
    for start, module, package in OF_OPTIMIZER:
        if name.startswith(start):
            return None if find_spec(module) else package
    return None


def missing_for_attention(name: str) -> str | None:
    """The same for an attention backend. With `kernels` installed, transformers fetches flash attention by itself."""
    module, package = OF_ATTENTION.get(name, (None, None))
    return None if module is None or find_spec(module) or find_spec("kernels") else package
