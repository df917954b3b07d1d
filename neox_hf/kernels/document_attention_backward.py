"""Document attention's backward pass, in Triton: the gradients of queries, then those of keys and values.

A block of queries goes through the keys that it sees, a block of keys through the queries that see it; of both, what is
seen as a whole is not looked at by pairs, as in the forward pass.

    ds_ij = p_ij (dy_i v_j - y_i dy_i)
    dq_i = scale sum over j of ds_ij k_j     dk_j = scale sum over i of ds_ij q_i     dv_j = sum over i of p_ij dy_i

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
from neox_hf.kernels.qkv_gradient import interleaved
from neox_hf.kernels.registration import register, register_fake


@triton.jit
def _through_keys(
    gradient, q, above, logs, sums, first, behind, key, value, kept, key_token, value_token, batch, sequence, scale,
    low, high,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, IN_QUESTION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries, gone on over the keys from low to high."""
    for start in tl.range(low, high, KEYS):
        column = start + tl.arange(0, KEYS)
        k = load_rows(key, column, key_token, sequence, SIZE, WIDTH, IN_QUESTION)
        v = load_rows(value, column, value_token, sequence, SIZE, WIDTH, IN_QUESTION)
        weights = tl.exp2(product(q, tl.trans(k), PRECISION) * scale - logs[:, None])
        if IN_QUESTION:
            seen = (column[None, :] >= first[:, None]) & (column[None, :] < behind[:, None])
            weights = tl.where(seen & load_kept(kept, batch, column, sequence)[None, :], weights, 0.0)
        of_scores = weights * (product(above, tl.trans(v), PRECISION) - sums[:, None])
        gradient += product(of_scores.to(k.dtype), k, PRECISION)
    return gradient


@triton.jit
def _query_gradient_kernel(
    upstream, query, key, value, first, behind, kept, output, log_sum, delta, gradient, scale, factor, sequence, heads,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries, and delta: of each row the output times its gradient."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    row = begin + tl.arange(0, QUERIES)
    inside = row < sequence
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    q = load_rows(query, row, query_token, sequence, SIZE, WIDTH, True)
    at, of_head = (batch * sequence * heads + head) * SIZE, (batch * heads + head) * sequence
    above = load_rows(upstream + at, row, heads * SIZE, sequence, SIZE, WIDTH, True)
    out = load_rows(output + at, row, heads * SIZE, sequence, SIZE, WIDTH, True)
    sums = tl.sum(out.to(tl.float32) * above.to(tl.float32), axis=1)
    tl.store(delta + of_head + row, sums, mask=inside)
    logs = tl.load(log_sum + of_head + row, mask=inside, other=0.0)
    span = batch * sequence
    own_first, own_behind, some_see, all_see, not_all_see, none_see = spans_of_queries(
        first + span, behind + span, row, begin, sequence, KEYS
    )
    dq = tl.zeros([QUERIES, WIDTH], tl.float32)
    for part in tl.static_range(3):
        low, high = part_between(part, some_see, all_see, not_all_see, none_see)
        dq = _through_keys(
            dq, q, above, logs, sums, own_first, own_behind, key, value, kept, key_token, value_token, batch, sequence,
            scale, low, high, SIZE, WIDTH, KEYS, part != 1 or kept is not None, PRECISION,
        )  # fmt: skip
    store_rows(gradient + 3 * at, row, heads * 3 * SIZE, sequence, dq * factor, SIZE, WIDTH)


@triton.jit
def _through_queries(
    of_key, of_value, k, v, column, end, keep, upstream, query, log_sum, delta, out_token, query_token,
    sequence, scale, low, high,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, IN_QUESTION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and of its values, gone on over the queries from low to high."""
    for start in tl.range(low, high, QUERIES):
        row = start + tl.arange(0, QUERIES)
        q = load_rows(query, row, query_token, sequence, SIZE, WIDTH, IN_QUESTION)
        above = load_rows(upstream, row, out_token, sequence, SIZE, WIDTH, IN_QUESTION)
        # Rows beyond the sequence may read what they like: they see no key.
        inside = tl.minimum(row, sequence - 1) if IN_QUESTION else row
        logs, sums = tl.load(log_sum + inside), tl.load(delta + inside)
        weights = tl.exp2(product(k, tl.trans(q), PRECISION) * scale - logs[None, :])
        if IN_QUESTION:
            seen = (row[None, :] >= column[:, None]) & (row[None, :] < end[:, None])
            weights = tl.where(seen & keep[:, None], weights, 0.0)
        of_value += product(weights.to(above.dtype), above, PRECISION)
        of_scores = weights * (product(v, tl.trans(above), PRECISION) - sums[None, :])
        of_key += product(of_scores.to(q.dtype), q, PRECISION)
    return of_key, of_value


@triton.jit
def _key_value_gradient_kernel(
    upstream, query, key, value, end, kept, log_sum, delta, of_keys, of_values, scale, factor, sequence, heads,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and of its values. The first part are the queries at the keys' own places."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    begin = tl.program_id(0) * KEYS
    column, own_end = begin + tl.arange(0, KEYS), begin + KEYS
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    k = load_rows(key, column, key_token, sequence, SIZE, WIDTH, True)
    v = load_rows(value, column, value_token, sequence, SIZE, WIDTH, True)
    keep = load_kept(kept, batch, column, sequence)
    at, of_head = (batch * sequence * heads + head) * SIZE, (batch * heads + head) * sequence
    # Nobody sees keys beyond the sequence, so they say nothing about where all keys are seen.
    last = tl.load(end + batch * sequence + column, mask=column < sequence, other=-1)
    some_seen = tl.max(last, axis=0)
    all_seen = tl.maximum(tl.min(tl.where(last < 0, some_seen, last), axis=0) // QUERIES * QUERIES, own_end)
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH], tl.float32)
    for part in tl.static_range(3):
        low, high = part_between(part, begin, own_end, all_seen, some_seen)
        dk, dv = _through_queries(
            dk, dv, k, v, column, last, keep, upstream + at, query, log_sum + of_head,
            delta + of_head, heads * SIZE, query_token, sequence, scale, low, high,
            SIZE, WIDTH, QUERIES, part != 1 or kept is not None, PRECISION,
        )  # fmt: skip
    store_rows(of_keys + 3 * at, column, heads * 3 * SIZE, sequence, dk * factor, SIZE, WIDTH)
    store_rows(of_values + 3 * at, column, heads * 3 * SIZE, sequence, dv, SIZE, WIDTH)


QUERY_GRADIENT = LaunchChoice(
    "document_attention_of_queries",
    fitting(
        {
            (2, 64): (BlockLaunch(64, 64, 4, 3), BlockLaunch(64, 64, 4, 2), BlockLaunch(128, 64, 8, 3)),
            (2, 128): (BlockLaunch(64, 64, 4, 2), BlockLaunch(64, 32, 4, 3), BlockLaunch(128, 64, 8, 3)),
            (2, 256): (BlockLaunch(64, 32, 8, 2), BlockLaunch(32, 32, 4, 2)),
            (4, 64): (BlockLaunch(32, 32, 4, 1), BlockLaunch(64, 32, 8, 1)),
            (4, 128): (BlockLaunch(32, 32, 8, 1), BlockLaunch(32, 16, 4, 1)),
            (4, 256): (BlockLaunch(16, 16, 4, 1), BlockLaunch(16, 16, 8, 1)),
        },
        lambda launch: (2 * launch.queries, 2 * launch.keys),
    ),
)
KEY_VALUE_GRADIENT = LaunchChoice(
    "document_attention_of_keys",
    fitting(
        {
            (2, 64): (BlockLaunch(64, 64, 4, 2), BlockLaunch(32, 64, 4, 3), BlockLaunch(64, 128, 8, 2)),
            (2, 128): (BlockLaunch(32, 64, 4, 3), BlockLaunch(64, 64, 4, 2), BlockLaunch(64, 128, 8, 2)),
            (2, 256): (BlockLaunch(32, 32, 4, 1), BlockLaunch(32, 64, 8, 2)),
            (4, 64): (BlockLaunch(32, 32, 8, 1), BlockLaunch(32, 32, 4, 1)),
            (4, 128): (BlockLaunch(16, 32, 8, 1), BlockLaunch(32, 32, 8, 1)),
            (4, 256): (BlockLaunch(16, 16, 8, 1), BlockLaunch(16, 16, 4, 1)),
        },
        lambda launch: (2 * launch.keys, 2 * launch.queries),
    ),
)


@register("document_attn_backward")
def document_attn_backward(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    behind: Tensor,
    end: Tensor,
    kept: Tensor | None,
    output: Tensor,
    log_sum: Tensor,
    scale: float,
) -> Tensor:
    """Gradients of query, key and value, interleaved in one [B, S, N, 3, D]."""
    gradients = interleaved(query)
    if query.numel() == 0:
        return gradients
    batch, heads, sequence, _ = query.shape
    shape, strides = BlockShape.of(query), leading_strides(query, key, value)
    delta = torch.empty_like(log_sum)
    of_query, of_key, of_value = gradients.unbind(dim=3)
    sizes = scale * LOG2_E, scale, sequence, heads
    launch = QUERY_GRADIENT.chosen(query.device, query.dtype, *shape)
    inputs = upstream.contiguous(), query, key, value
    _query_gradient_kernel[(-(-sequence // launch.queries), heads, batch)](
        *inputs,
        first,
        behind,
        kept,
        output,
        log_sum,
        delta,
        of_query,
        *sizes,
        *strides,
        **block_constants(query, launch),
    )
    launch = KEY_VALUE_GRADIENT.chosen(query.device, query.dtype, *shape)
    _key_value_gradient_kernel[(-(-sequence // launch.keys), heads, batch)](
        *inputs, end, kept, log_sum, delta, of_key, of_value, *sizes, *strides, **block_constants(query, launch)
    )
    return gradients


@register_fake(document_attn_backward)
def _(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    behind: Tensor,
    end: Tensor,
    kept: Tensor | None,
    output: Tensor,
    log_sum: Tensor,
    scale: float,
) -> Tensor:
    return interleaved(query)
