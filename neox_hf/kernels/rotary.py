"""Partial rotary position embedding on the fused query-key-value projection, GPT-NeoX ("half") style.

With a = x[0 : R/2], b = x[R/2 : R] and c = x[R : D] of each query and key head, and the position's angles t [R/2]:

    a' = a cos t - b sin t        b' = b cos t + a sin t        c' = c

The gradient is turned back: the same with -t. Where a linear has made qkv, the sum over tokens of what comes out is the
gradient of its bias, and can be made in passing.

Shapes: qkv [B batch, S sequence, N heads, 3, D head size]; cos and sin [B or 1, S, R/2], fp32, where R <= D is the
rotated width; bias [N x 3 x D]; returns query, key and value, each [B, N, S, D].
Source: Su et al., 2021, arXiv 2104.09864; the halves, rather than adjacent pairs, are GPT-NeoX's (and the released
weights').
"""

from typing import Any

import torch
from torch import Tensor

from neox_hf.kernels.column_sums import finish_column_sums
from neox_hf.kernels.devices import multiprocessors
from neox_hf.kernels.dispatch import Op
from neox_hf.kernels.gradient_dtype import gradient_dtype
from neox_hf.kernels.language import tl, triton
from neox_hf.kernels.once_differentiable import once_differentiable
from neox_hf.kernels.qkv_gradient import heads, whole
from neox_hf.kernels.registration import register, register_fake
from neox_hf.kernels.rotary_back import rotary_back_with_sums
from neox_hf.kernels.rotary_launches import ASSEMBLE, ASSEMBLE_WITH_SUMS, IN_PLACE, tile, tile_in_place, without_gaps
from neox_hf.kernels.selective_checkpoint import selective_mode

KEEPS_ROTATION = "keeps_rotation"
"""A policy of selective checkpointing that keeps `neox_hf::rotary_in_place` says so by this attribute."""


def rotary_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, in_place: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate in fp32 and round once; never in place. Splits, not slices: their gradient is one concatenation."""
    if bias is not None:  # adds zeros, whose gradient is the bias's
        qkv = qkv + (bias - bias.detach()).to(qkv.dtype).view(qkv.shape[2:])
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, None, :], sin[:, :, None, None, :]
    query_key, value = qkv.split([2, 1], dim=3)
    rotated, passed = query_key.split([2 * half, qkv.shape[-1] - 2 * half], dim=-1)
    a, b = rotated.to(torch.promote_types(qkv.dtype, cos.dtype)).split([half, half], dim=-1)
    new_a = torch.addcmul(a * cos, b, sin, value=-1).to(qkv.dtype)
    new_b = torch.addcmul(b * cos, a, sin).to(qkv.dtype)
    query, key = torch.cat((new_a, new_b, passed), dim=-1).transpose(1, 2).unbind(dim=3)
    return query, key, value.squeeze(3).transpose(1, 2)


@triton.jit
def _load_angles(cos, sin, place, inside, BACK: tl.constexpr):
    """fp32 cos and sin [T, 1, columns], the latter negative where the way is back; outside no turn at all."""
    c = tl.load(cos + place, mask=inside, other=1.0).to(tl.float32)
    s = tl.load(sin + place, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        s = -s
    return c[:, None, :], s[:, None, :]


@triton.jit
def _load_turned(x, column, partner, c, s, inside, paired):
    """Each column times c, plus its partner times s, in fp32."""
    own = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    return own * c + tl.load(x + partner, mask=paired, other=0.0).to(tl.float32) * s


@triton.jit
def _in_place_kernel(
    qkv,
    cos,
    sin,
    tokens,
    sequence,
    angles_of_batch,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BACK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Turn the first 2 HALF elements of query and key, in a block of tokens [T] and of query and key heads [R]."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # query 0, key 0, query 1, ...
    column = tl.arange(0, BLOCK_HALF)
    here = (token < tokens)[:, None] & (column < HALF)[None, :]
    angle = (token // sequence)[:, None] * angles_of_batch + (token % sequence)[:, None] * HALF + column[None, :]
    c, s = _load_angles(cos, sin, angle, here, BACK)
    head = (row + row // 2) * SIZE  # a value is passed over after each key
    place = (token.to(tl.int64) * (HEADS * 3 * SIZE))[:, None, None] + head[None, :, None] + column[None, None, :]
    inside = (token < tokens)[:, None, None] & (row < 2 * HEADS)[None, :, None] & (column < HALF)[None, None, :]
    a = tl.load(qkv + place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(qkv + place + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(qkv + place, (a * c - b * s).to(qkv.dtype.element_ty), mask=inside)
    tl.store(qkv + place + HALF, (b * c + a * s).to(qkv.dtype.element_ty), mask=inside)


@triton.jit
def _assemble_kernel(
    query, key, value, out, cos, sin, tokens, sequence, angles_of_batch,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token, partial,
    HEADS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, UNDER_WAY: tl.constexpr,
):  # fmt: skip
    """out[B, S, N, 3, D] of blocks of tokens and heads, from tensors [B, N, S, D] of any strides but the last, 1.

    Every program takes each num_programs-th block of tokens and, where there is `partial` [programs, N, 3, D], writes
    the sums over its tokens there.
    """
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[None, :, None]
    far = head.to(tl.int64)  # a step from head to head may be most of a tensor
    columns = tl.arange(0, BLOCK_SIZE)
    turned = columns < 2 * HALF
    column = columns[None, None, :]
    # A column's partner in the rotation is in the cache, since the same program reads it as itself. Neighbours are read
    # together as far as the largest power of two in HALF goes.
    TOGETHER: tl.constexpr = HALF & -HALF if HALF > 0 else 1
    partner = tl.where(columns < HALF, columns + HALF, columns - HALF)
    partner = tl.max_contiguous(tl.multiple_of(partner, TOGETHER), TOGETHER)[None, None, :]
    of_query = tl.zeros([BLOCK_TOKENS, BLOCK_HEADS, BLOCK_SIZE], tl.float32)
    of_key, of_value = of_query, of_query
    for block in tl.range(tl.program_id(0), tl.cdiv(tokens, BLOCK_TOKENS), tl.num_programs(0), num_stages=UNDER_WAY):
        token = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        batch, position = token // sequence, token % sequence
        here = (token < tokens)[:, None] & turned[None, :]
        angle = (batch * angles_of_batch + position * HALF)[:, None]
        angle += tl.where(columns < HALF, columns, columns - HALF)[None, :]
        c, s = _load_angles(cos, sin, angle, here, BACK)
        s *= tl.where(columns < HALF, -1.0, 1.0)[None, None, :]
        inside = (token < tokens)[:, None, None] & (head < HEADS) & (column < SIZE)
        paired = inside & turned[None, None, :]
        batch, position = batch.to(tl.int64)[:, None, None], position.to(tl.int64)[:, None, None]
        from_query = query + (batch * query_batch + far * query_head + position * query_token)
        from_key = key + (batch * key_batch + far * key_head + position * key_token)
        from_value = value + (batch * value_batch + far * value_head + position * value_token)
        q = _load_turned(from_query, column, partner, c, s, inside, paired)
        k = _load_turned(from_key, column, partner, c, s, inside, paired)
        v = tl.load(from_value + column, mask=inside, other=0.0)
        to = out + token.to(tl.int64)[:, None, None] * (HEADS * 3 * SIZE) + head * (3 * SIZE) + column
        tl.store(to, q.to(out.dtype.element_ty), mask=inside)
        tl.store(to + SIZE, k.to(out.dtype.element_ty), mask=inside)
        tl.store(to + 2 * SIZE, v, mask=inside)
        if partial is not None:
            of_query, of_key, of_value = of_query + q, of_key + k, of_value + v.to(tl.float32)
    if partial is not None:
        place = tl.program_id(0) * (HEADS * 3 * SIZE) + head * (3 * SIZE) + column
        inside = (head < HEADS) & (column < SIZE)
        tl.store(partial + place, tl.sum(of_query, axis=0, keep_dims=True), mask=inside)
        tl.store(partial + place + SIZE, tl.sum(of_key, axis=0, keep_dims=True), mask=inside)
        tl.store(partial + place + 2 * SIZE, tl.sum(of_value, axis=0, keep_dims=True), mask=inside)


# A compiler, too, has it rotate in place, where it can prove that nobody reads the buffer afterwards.
@register("rotary_in_place", mutates=("qkv",))
def rotary_in_place(qkv: Tensor, cos: Tensor, sin: Tensor, back: bool) -> None:
    """Turn query and key inside the contiguous qkv [B, S, N, 3, D]; `back` is by the negative angles."""
    batch, sequence, count, _, size = qkv.shape
    if qkv.numel() == 0 or cos.shape[-1] == 0:
        return
    cos, sin, angles_of_batch = without_gaps(cos, sin)
    half, rows = cos.shape[-1], 2 * count
    launch = IN_PLACE.chosen(qkv.device, qkv.dtype, count, size, half)
    block_tokens, block_rows, block_half, warps = tile_in_place(launch, half, rows)
    grid = (-(-batch * sequence // block_tokens), -(-rows // block_rows))
    _in_place_kernel[grid](
        qkv,
        cos,
        sin,
        batch * sequence,
        sequence,
        angles_of_batch,
        HEADS=count,
        SIZE=size,
        HALF=half,
        BACK=back,
        BLOCK_TOKENS=block_tokens,
        BLOCK_ROWS=block_rows,
        BLOCK_HALF=block_half,
        num_warps=warps,
    )


@register_fake(rotary_in_place)
def _(qkv: Tensor, cos: Tensor, sin: Tensor, back: bool) -> None:
    return None


@register("rotary_assemble")
def rotary_assemble(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, back: bool, sum_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Turn query and key [B, N, S, D] and lay them with value into a new [B, S, N, 3, D]; each byte is moved once.

    Besides, with a `sum_dtype`, the sums [N x 3 x D] over all tokens; else an empty tensor.
    """
    batch, count, sequence, size = query.shape
    out = query.new_empty(batch, sequence, count, 3, size)
    if out.numel() == 0:
        return out, query.new_zeros(0 if sum_dtype is None else count * 3 * size, dtype=sum_dtype)
    # What a sum sends back is one element expanded over all.
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    cos, sin, angles_of_batch = without_gaps(cos, sin)
    shape = count, size, cos.shape[-1]
    if sum_dtype is None:
        launch = ASSEMBLE.chosen(query.device, query.dtype, *shape)
    else:
        launch = ASSEMBLE_WITH_SUMS.chosen(query.device, query.dtype, *shape, query.element_size())
    block_tokens, block_heads, block_size = tile(size, count, launch.elements)
    programs, blocks = -(-batch * sequence // block_tokens), -(-count // block_heads)
    partial = None
    if sum_dtype is not None:
        programs = min(programs, max(multiprocessors(query.device) * launch.programs // blocks, 1))
        partial = query.new_empty(programs, count * 3 * size, dtype=torch.float32)
    _assemble_kernel[(programs, blocks)](
        query,
        key,
        value,
        out,
        cos,
        sin,
        batch * sequence,
        sequence,
        angles_of_batch,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        partial,
        HEADS=count,
        SIZE=size,
        HALF=cos.shape[-1],
        BACK=back,
        BLOCK_TOKENS=block_tokens,
        BLOCK_HEADS=block_heads,
        BLOCK_SIZE=block_size,
        UNDER_WAY=1 if partial is None else launch.under_way,
        num_warps=launch.warps,
    )
    return out, query.new_empty(0) if partial is None else finish_column_sums(partial, sum_dtype)


@register_fake(rotary_assemble)
def _(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, back: bool, sum_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    batch, count, sequence, size = query.shape
    sums = query.new_empty(0 if sum_dtype is None else count * 3 * size, dtype=sum_dtype)
    return query.new_empty(batch, sequence, count, 3, size), sums


class _Rotary(torch.autograd.Function):
    """Changes its input unknown to autograd, which would otherwise want one output for it and add the three gradients
    up in a pass of its own. The version counter is raised as it should be: whoever else keeps qkv for a backward pass
    is told by autograd."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, in_place: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.sum_dtype = gradient_dtype(bias) if ctx.needs_input_grad[4] else None
        ctx.set_materialize_grads(False)
        ctx.takes_one_buffer = True
        if not in_place:
            return heads(rotary_assemble(*heads(qkv), cos, sin, False, None)[0])
        turned = qkv.detach()
        rotary_in_place(turned, cos, sin, False)
        return heads(turned)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = next((gradient for gradient in gradients if gradient is not None), None)
        if given is None:
            return None, None, None, None, None
        (cos, sin), dtype = ctx.saved_tensors, ctx.sum_dtype
        buffer = None if torch.compiler.is_compiling() else whole(*gradients)
        if buffer is not None:
            if dtype is not None:
                return buffer, None, None, None, rotary_back_with_sums(buffer, cos, sin, dtype)
            rotary_in_place(buffer, cos, sin, True)
            return buffer, None, None, None, None
        if any(gradient is None for gradient in gradients):
            # What is not given is one row of zeros, read again and again.
            nothing = given.new_zeros(given.shape[-1]).expand_as(given)
            gradients = [nothing if gradient is None else gradient for gradient in gradients]
        for_qkv, sums = rotary_assemble(*gradients, cos, sin, True, dtype)
        return for_qkv, None, None, None, None if dtype is None else sums


def may_change(qkv: Tensor) -> bool:
    """Whether the bytes of qkv may be rotated where they are: none twice, none of a parameter's, none twice over."""
    owner = qkv if qkv._base is None else qkv._base
    if not qkv.is_contiguous() or (owner.is_leaf and owner.requires_grad):
        return False
    # A trace would have both this op and what is within it, one after the other.
    return torch.compiler.is_compiling() or not (torch.jit.is_tracing() or _is_rotated_again())


def _is_rotated_again() -> bool:
    """Whether selective checkpointing may keep qkv but not its rotation, which would turn it again in the second pass.

    It does not with a policy that keeps both and says so: then the second pass finds the kept qkv rotated, and the
    operator kept.
    """
    mode = selective_mode()
    if mode is None:
        return False
    if hasattr(mode, "policy_fn"):
        return not getattr(mode.policy_fn, KEEPS_ROTATION, False)
    return torch.ops.neox_hf.rotary_in_place.default not in mode.storage


def rotary_triton(
    qkv: Tensor, cos: Tensor, sin: Tensor, in_place: bool = True, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Views of qkv, rotated where it is, or of a rotated copy."""
    return _Rotary.apply(qkv, cos, sin, in_place and may_change(qkv), bias)


ROTARY = Op("rotary", torch=rotary_reference, triton=rotary_triton)


def rotary(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    in_place: bool = True,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Split qkv [B, S, N, 3, D] into query, key and value [B, N, S, D] and rotate the first two.

    in_place: the kernel rotates inside qkv and returns views of it, so qkv must be of no further use: the output of a
    linear is not, whose gradients do not need it. A forward hook on that linear that keeps its output sees it change.
    An operation that has saved qkv for its gradient fails in the backward pass with autograd's own message; then say
    False. The kernel copies, in the same pass, a qkv that is not contiguous, that is a parameter's memory, or that
    selective checkpointing may keep and rotate again. The reference always copies. cos and sin get no gradient from the
    kernel.

    bias [N x 3 x D]: what the linear before has added to qkv already, detached. It gets its gradient from here, where
    the kernel sums it up in passing, and is not read.

    Raises:
        ValueError: the shapes do not fit, or the angles are wider than a head.
    """
    if 2 * cos.shape[-1] > qkv.shape[-1]:
        raise ValueError(
            f"rotary width {2 * cos.shape[-1]} is over the head size {qkv.shape[-1]}; rotary_pct must be at most 1"
        )
    batch, sequence, _, parts, _ = qkv.shape
    fits = cos.shape == sin.shape and cos.shape[0] in (1, batch) and cos.shape[1] == sequence
    if parts != 3 or not fits:
        raise ValueError(
            f"rotary was given qkv {list(qkv.shape)}, cos {list(cos.shape)} and sin {list(sin.shape)}; "
            "it wants [B, S, N, 3, D] and twice [B or 1, S, R/2]"
        )
    if bias is not None and bias.shape != (qkv.shape[2:].numel(),):
        raise ValueError(f"rotary was given a bias {list(bias.shape)} of qkv {list(qkv.shape)}; it wants [N x 3 x D]")
    return ROTARY.choose(backend, qkv)(qkv, cos, sin, in_place, bias)
