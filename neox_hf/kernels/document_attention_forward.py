"""Document attention's forward pass, in Triton: what a block of queries sees as a whole is not looked at by pairs.

The keys that a block of queries sees have three parts, in this order: some that not all of its queries see; then such
as all see; then those at the queries' own places, or where padding begins. In the second no pair is in question.

Shapes and names as in `document_attention.py`.
"""

import torch
from torch import Tensor

from neox_hf.kernels.document_attention_blocks import (
    LOG2_E,
    BlockLaunch,
    BlockShape,
    block_constants,
    fitting,
    leading_strides,
    load_kept,
    load_rows,
    part_between,
    product,
    spans_of_queries,
    store_rows,
)
from neox_hf.kernels.language import tl, triton
from neox_hf.kernels.launch_choice import LaunchChoice
from neox_hf.kernels.registration import register, register_fake


@triton.jit
def _attend(
    total, largest, attended, q, first, behind, key, value, kept, key_token, value_token, batch, sequence, scale,
    low, high,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, IN_QUESTION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax's sums of a block of queries, gone on over the keys from low to high."""
    for start in tl.range(low, high, KEYS):
        column = start + tl.arange(0, KEYS)
        k = load_rows(key, column, key_token, sequence, SIZE, WIDTH, IN_QUESTION)
        scores = product(q, tl.trans(k), PRECISION)
        if IN_QUESTION:
            seen = (column[None, :] >= first[:, None]) & (column[None, :] < behind[:, None])
            scores = tl.where(seen & load_kept(kept, batch, column, sequence)[None, :], scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1) * scale)
        base = tl.where(larger == -float("inf"), 0.0, larger) if IN_QUESTION else larger
        powers = tl.exp2(scores * scale - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(powers, axis=1)
        v = load_rows(value, column, value_token, sequence, SIZE, WIDTH, IN_QUESTION)
        attended = attended * shrink[:, None] + product(powers.to(v.dtype), v, PRECISION)
        largest = larger
    return total, largest, attended


@triton.jit
def _forward_kernel(
    query, key, value, first, behind, kept, output, log_sum, scale, sequence, heads,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    # Later queries see more keys on the whole: those begin first.
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    row = begin + tl.arange(0, QUERIES)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    q = load_rows(query, row, query_token, sequence, SIZE, WIDTH, True)
    at = batch * sequence
    own_first, own_behind, some_see, all_see, not_all_see, none_see = spans_of_queries(
        first + at, behind + at, row, begin, sequence, KEYS
    )
    total = tl.zeros([QUERIES], tl.float32)
    largest = tl.full([QUERIES], -float("inf"), tl.float32)
    attended = tl.zeros([QUERIES, WIDTH], tl.float32)
    for part in tl.static_range(3):
        low, high = part_between(part, some_see, all_see, not_all_see, none_see)
        total, largest, attended = _attend(
            total, largest, attended, q, own_first, own_behind, key, value, kept, key_token, value_token, batch,
            sequence, scale, low, high, SIZE, WIDTH, KEYS, part != 1 or kept is not None, PRECISION,
        )  # fmt: skip
    attended = attended / tl.where(total > 0.0, total, 1.0)[:, None]
    output += (batch * sequence * heads + head) * SIZE
    store_rows(output, row, heads * SIZE, sequence, attended, SIZE, WIDTH)
    log_sum += (batch * heads + head) * sequence
    tl.store(log_sum + row, largest + tl.log2(total), mask=row < sequence)


# Small blocks first: where documents meet every pair is in question, and they are short beside large ones.
FORWARD = LaunchChoice(
    "document_attention_forward",
    fitting(
        {
            (2, 64): (BlockLaunch(64, 64, 4, 3), BlockLaunch(128, 64, 8, 3), BlockLaunch(128, 128, 8, 2)),
            (2, 128): (BlockLaunch(64, 64, 4, 3), BlockLaunch(128, 64, 8, 3), BlockLaunch(128, 128, 8, 2)),
            (2, 256): (BlockLaunch(128, 32, 8, 2), BlockLaunch(64, 32, 4, 2), BlockLaunch(64, 64, 4, 2)),
            (4, 64): (BlockLaunch(64, 32, 4, 2), BlockLaunch(32, 32, 4, 2)),
            (4, 128): (BlockLaunch(32, 32, 4, 1), BlockLaunch(64, 16, 4, 1)),
            (4, 256): (BlockLaunch(32, 32, 8, 1), BlockLaunch(16, 16, 4, 1)),
        },
        lambda launch: (launch.queries, 2 * launch.keys),
    ),
)


# The name tells selective recomputation that this is attention, to be kept (modeling/recompute.py).
@register("document_attn_forward")
def document_attn_forward(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, behind: Tensor, kept: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, S, N, D] and, fp32 [B, N, S], log2 of each softmax's denominator, -inf where nothing is seen."""
    batch, heads, sequence, size = query.shape
    output = query.new_empty(batch, sequence, heads, size)
    log_sum = query.new_empty(batch, heads, sequence, dtype=torch.float32)
    if query.numel() == 0:
        return output, log_sum
    launch = FORWARD.chosen(query.device, query.dtype, *BlockShape.of(query))
    _forward_kernel[(-(-sequence // launch.queries), heads, batch)](
        query,
        key,
        value,
        first,
        behind,
        kept,
        output,
        log_sum,
        scale * LOG2_E,
        sequence,
        heads,
        *leading_strides(query, key, value),
        **block_constants(query, launch),
    )
    return output, log_sum


@register_fake(document_attn_forward)
def _(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, behind: Tensor, kept: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, sequence, size = query.shape
    log_sum = query.new_empty(batch, heads, sequence, dtype=torch.float32)
    return query.new_empty(batch, sequence, heads, size), log_sum
