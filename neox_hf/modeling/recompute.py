"""What a block computes again in the backward pass, to save memory.

    none        nothing: every intermediate is kept
    selective   the cheap operations (norms, rotary, activation, dropout); matrix products and attention are kept
    full        the whole block: only its input is kept

`selective` has two forms. Where kernels run and products sum the gradients of their weights, the backward kernels of
norms and activations make their outputs again in the pass that they make anyway, for the linears behind them
(`kernels/late_tensor.py`). Elsewhere torch's checkpointing runs the cheap operations a second time.

Gradients are the same in all three, in torch's form to the last bit where the device's operations repeat themselves.
There, attention that is written out (`attn_implementation: eager`) is computed again too, since what it keeps grows
with the sequence squared.
Source: selective recomputation, Korthikanti et al., 2022, arXiv 2205.05198, section 5; here per operation.
"""

from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)
from transformers import PreTrainedModel

from neox_hf.kernels import LAYER_NORM
from neox_hf.kernels.product import linear_product_op
from neox_hf.kernels.weight_gradient import sum_of
from neox_hf.parallel import ColumnParallelLinear, Linear

Recompute = Literal["none", "selective", "full"]

PRODUCTS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_mm.default,
        linear_product_op,
    }
)
"""What a linear comes to. The batched products of attention that is written out are none of them."""

ATTENTION = ("scaled_dot_product", "flash_attn", "flex_attention", "document_attn")
"""Parts of the names of fused attention operations: torch's for each device, and those of packages."""

PRODUCTS_OF_A_BLOCK = 4
"""The last of them gives what the block adds to its input, which no gradient needs."""


def recompute_kwargs(mode: Recompute) -> dict[str, Any] | None:
    """Arguments for `model.activation_checkpointing_enable(kwargs)`, or for `torch.utils.checkpoint.checkpoint`; None
    where nothing is computed again.

    HF's training argument `activation_checkpointing: true` is `full`. `selective` needs a function among its arguments,
    which does not fit into `activation_checkpointing_kwargs`: those are written to JSON.

    Raises:
        ValueError: there is no such mode.
    """
    if mode not in get_args(Recompute):
        raise ValueError(
            f"activation_checkpointing={mode!r} is unknown; choose one of {', '.join(get_args(Recompute))}"
        )
    if mode == "none":
        return None
    return {"use_reentrant": False} | ({"context_fn": selective_contexts} if mode == "selective" else {})


def recompute_selectively(model: PreTrainedModel, *, compiled: bool = False) -> None:
    """Switch `selective` on for a model whose gradients are about to be summed as they will be."""
    model.gradient_checkpointing_disable()
    makers = [module for module in model.modules() if hasattr(module, "makes_again")]
    by_kernels = not compiled and makes_outputs_again(model)
    for module in makers:
        module.makes_again = by_kernels
    if not by_kernels:
        model.activation_checkpointing_enable(recompute_kwargs("selective"))


def makes_outputs_again(model: PreTrainedModel) -> bool:
    """Whether kernels compute what this process holds of the model, and its linears sum their weights' gradients."""
    linears = [module for module in model.modules() if isinstance(module, (Linear, ColumnParallelLinear))]
    weights = [linear.weight for linear in linears if linear.weight.requires_grad and not linear.weight.is_meta]
    if not weights or not all(sum_of(weight) for weight in weights):
        return False
    return all(LAYER_NORM.has_kernel_for(linear.kernels, weights[0]) for linear in linears)


def selective_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of one block's forward pass, and of computing it again."""
    return create_selective_checkpoint_contexts(_KeepDearOperations())


class _KeepDearOperations:
    """The policy of one forward pass through one block."""

    def __init__(self) -> None:
        self.products = 0

    def __call__(self, context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in PRODUCTS:
            self.products += 1
            keep = self.products % PRODUCTS_OF_A_BLOCK != 0
        else:
            keep = any(part in op.name() for part in ATTENTION)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
