"""What `train.precision` means: the dtype of weights, of arithmetic, and of what the optimizer keeps."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Precision:
    """One row of the table below.

    weights: dtype of parameters and activations, and of the weights on disk.
    autocast: run matrix products in bf16 over fp32 weights (HF's `bf16=True`).
    master: keep fp32 master weights, moments and gradients beside low-precision weights.
    scaled: the loss is scaled so that gradients do not vanish, which only DeepSpeed does here.
    fp8: the linears of the block compute in eight bits, whose scales are part of a run's state.
    """

    weights: torch.dtype
    autocast: bool = False
    master: bool = False
    scaled: bool = False
    fp8: bool = False


PRECISIONS = {
    "fp32": Precision(torch.float32),
    "amp": Precision(torch.float32, autocast=True),
    "bf16": Precision(torch.bfloat16, master=True),
    "pure_bf16": Precision(torch.bfloat16),
    "fp16": Precision(torch.float16, master=True, scaled=True),
    "fp8": Precision(torch.bfloat16, master=True, fp8=True),
}


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the parameters of `model` in place, and nothing else.

    Buffers keep their dtype: rounded rotary frequencies would train a model that no `from_pretrained` gives back.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def default_precision() -> str:
    """What `auto` stands for on this host: `bf16` with CUDA, else `fp32`."""
    return "bf16" if torch.cuda.is_available() else "fp32"


def precision_here(name: str) -> str:
    """The precision that `name` comes to on this host: `auto` is its default, all others are themselves."""
    return default_precision() if name == "auto" else name


def precision_asked(name: str, *, bf16: bool, fp16: bool) -> str:
    """What `name` comes to on this host beside HF's two flags, which decide what `auto` is, and mean autocast there.

    Raises:
        ValueError: a flag contradicts `name`.
    """
    if name == "auto" and bf16 != fp16:
        return "amp" if bf16 else "fp16"
    name = precision_here(name)
    for flag, raised, fits in (("bf16", bf16, name not in ("fp32", "fp16")), ("fp16", fp16, name == "fp16")):
        if raised and not fits:
            raise ValueError(f"{flag}=True beside precision={name!r}; leave out one of the two")
    return name


def precision_of(name: str) -> Precision:
    """The row called `name`.

    Raises:
        ValueError: there is none.
    """
    try:
        return PRECISIONS[name]
    except KeyError:
        raise ValueError(f"train.precision={name!r} is unknown; choose one of {sorted(PRECISIONS)}") from None
