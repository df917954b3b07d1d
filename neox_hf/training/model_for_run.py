"""A model as a run of one trainer wants it, whatever the trainer before has set on it."""

from typing import Any

import torch
from torch import nn

from neox_hf.kernels.weight_gradient import ATTRIBUTE, sum_in
from neox_hf.modeling.causal_lm import regularise_logits
from neox_hf.parallel import Linear
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.precision import cast_weights


def model_for_run(model: nn.Module, args: NeoXTrainingArguments) -> nn.Module:
    """`model` itself, its weights in the precision of `args`, with the loss that they ask for.

    Raises:
        ValueError: its loss cannot have a z-loss.
    """
    cast_weights(model, args.numeric.weights)
    _undo_former_run(model)
    if args.z_loss:
        regularise_logits(model, args.z_loss)
    return model


def _undo_former_run(model: nn.Module) -> None:
    for module in model.modules():
        vars(module).pop("z_loss", None)
        for name, default in (("makes_again", False), ("graphs", None)):
            if hasattr(module, name):
                setattr(module, name, default)
        if isinstance(module, Linear):
            module.fp8 = None
    for parameter in model.parameters():
        hooks = parameter._post_accumulate_grad_hooks or {}
        for key in [key for key, hook in hooks.items() if _was_attached_by_a_run(hook)]:
            del hooks[key]  # else gradients would go on into buckets and optimizers of that run
        if not _was_attached_by_a_run(getattr(parameter, ATTRIBUTE, None)):
            continue
        sum_in(parameter, None)
        if parameter.grad_dtype == torch.float32 != parameter.dtype:
            parameter.grad = None
            parameter.grad_dtype = parameter.dtype


def _was_attached_by_a_run(thing: Any) -> bool:
    """Whether a hook or a sum on a parameter is of ours or DeepSpeed's code, and not a user's."""
    return (getattr(thing, "__module__", None) or "").partition(".")[0] in ("neox_hf", "deepspeed")
