"""Having a model's blocks train in eight bits.

Weights stay what they are, in bf16, with their names, and so does all that is saved or evaluated. The linears of the
block round what they multiply (`kernels/fp8_linear.py`); embedding, head, norms and attention do not.
"""

import logging
import re

import torch
from torch import nn

from neox_hf.errors import RecipeError
from neox_hf.kernels.fp8_linear import Fp8Linear, reason_against_fp8, slot_dtypes
from neox_hf.kernels.fp8_product import reason_against_device
from neox_hf.kernels.fp8_scales import Fp8Scales
from neox_hf.kernels.fp8_weights import refresh_weights
from neox_hf.parallel import Linear

logger = logging.getLogger(__name__)

LAYER_NUMBER = re.compile(r"[.]\d+[.]")


def compute_in_fp8(model: nn.Module) -> Fp8Scales:
    """Have every linear of the blocks of `model` that can train in eight bits do so; one line of the log names others.

    model: on its device, in the precision of its weights. Whoever trains it calls `advance` of what this returns after
    each optimizer step, and `refresh_fp8_weights` then.

    Raises:
        RecipeError: the device has no eight-bit products, or no linear can be computed so.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    reasons = {name: reason_against_fp8(linear.weight) for name, linear in linears.items()}
    able = [name for name, reason in reasons.items() if reason is None]
    if not able:
        found = _in_one_line(reasons) or f"a {type(model).__name__} without linears of neox_hf's block"
        raise RecipeError(f"nothing of this model can be computed in fp8: {found}; use bf16")
    device = linears[able[0]].weight.device
    if reason := reason_against_device(device):
        raise RecipeError(f"fp8 cannot be computed here: {reason}; use bf16")
    backend = getattr(model.config, "kernels", "auto")
    table = Fp8Scales(slot_dtypes(able), device)
    for name in able:
        linears[name].fp8 = Fp8Linear(table, name, backend)
    _report(able, {name: reason for name, reason in reasons.items() if reason}, device)
    return table


def refresh_fp8_weights(model: nn.Module) -> None:
    """Make the weights in eight bits for the step to come, outside of any CUDA graph: such a graph only reads them."""
    linears = [module for module in model.modules() if isinstance(module, Linear) and module.fp8 is not None]
    refresh_weights([linear.fp8.weight for linear in linears], [linear.weight for linear in linears])


def _report(able: list[str], others: dict[str, str], device: torch.device) -> None:
    slow = f", by torch's arithmetic, which is slow: {device.type} has no such products"
    logger.info("fp8: %d linears train in eight bits%s", len(able), "" if device.type == "cuda" else slow)
    if others:
        logger.warning("fp8: these stay in half precision: %s", _in_one_line(others))


def _in_one_line(reasons: dict[str, str]) -> str:
    """Linears and reasons, those of all layers as one."""
    lines = [f"{LAYER_NUMBER.sub('.*.', name)} ({reason})" for name, reason in reasons.items()]
    return "; ".join(dict.fromkeys(lines))
