"""Gradients of query, key and value that lie interleaved in one buffer, as the fused projection wants its own.

An attention that writes into `interleaved` views spares the pass that puts three tensors together: the rotation is
undone inside the buffer, and the buffer goes on as it is. Shapes: B batch, S sequence, N heads, D head size.
"""

from typing import Any

from torch import Tensor

HANDED_OVER = "_gradients_of_query_key_and_value"
"""Set on a buffer that its taker may change. One that merely looks alike may be somebody's, who wants it unchanged."""


def heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views [B, N, S, D] of query, key and value in [B, S, N, 3, D]."""
    query, key, value = qkv.transpose(1, 2).unbind(dim=3)
    return query, key, value


def interleaved(like: Tensor) -> Tensor:
    """A new buffer [B, S, N, 3, D] for gradients like a query [B, N, S, D]."""
    batch, count, sequence, size = like.shape
    return like.new_empty(batch, sequence, count, 3, size)


def hand_over(buffer: Tensor, node: Any) -> None:
    """Let the rotation change `buffer` if all three inputs of `node`, an autograd node, come from one rotation.

    With an operation between the two, the gradients might be on their way to somebody else as well.
    """
    takers = {taker for taker, _ in node.next_functions[:3]}
    if len(takers) == 1 and getattr(takers.pop(), "takes_one_buffer", False):
        setattr(buffer, HANDED_OVER, True)


def whole(query: Tensor | None, key: Tensor | None, value: Tensor | None) -> Tensor | None:
    """The buffer [B, S, N, 3, D] where the three are its views and it was handed over, else None.

    They are its views no more where autograd has added another gradient to one of them out of place.
    """
    if query is None or key is None or value is None:
        return None
    buffer = query._base
    if buffer is None or not getattr(buffer, HANDED_OVER, False):
        return None
    found = zip((query, key, value), heads(buffer), strict=True)
    return buffer if all(_is_same_memory(x, view) for x, view in found) else None


def _is_same_memory(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
