"""What a block computes again in the backward pass, to save memory.

    none        nothing: every intermediate is kept
    selective   the cheap operations (norms, rotary, activation, dropout); matrix products and attention are kept
    full        the whole block: only its input is kept

Gradients are the same in all three, to the last bit where the device's operations repeat themselves. Attention that is
written out (`attn_implementation: eager`) is computed again too, since what it keeps grows with the sequence squared.
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

Recompute = Literal["none", "selective", "full"]

PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._scaled_mm.default})
"""What a linear comes to. The batched products of attention that is written out are none of them."""

ATTENTION = ("scaled_dot_product", "flash_attn", "flex_attention")
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
