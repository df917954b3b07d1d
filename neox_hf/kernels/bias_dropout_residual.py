"""What closes a residual block whose matrix products left their biases to be added here.

    y = x + drop(first + bias1) [+ drop(second + bias2)]
    drop(v) = 0 with probability p, else v / (1 - p)

Shapes: x, first, second [..., H], biases [H]; returns [..., H] in the dtype that x and the branches promote to,
computed in fp32 and rounded once.
Source: GPT-J and GPT-NeoX-20B (arXiv 2204.06745), section 2.1; Srivastava et al., 2014, for dropout.

Masks are a function of a seed on the device and of an element's row and column alone (Philox 4x32 with 7 rounds, the
fewest that pass every test of Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"), so that the backward
pass makes them again and nothing of their size is kept. One draw of four words serves two rows and both branches.
Without dropout the backward pass hands dy on as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neox_hf.kernels.column_sums import (
    WIDTHS,
    SummingTiles,
    block_width,
    column_grid,
    column_sums,
    finish_column_sums,
)
from neox_hf.kernels.devices import multiprocessors
from neox_hf.kernels.dispatch import Op
from neox_hf.kernels.gradient_dtype import gradient_dtype
from neox_hf.kernels.language import tl, triton
from neox_hf.kernels.launch_choice import LaunchChoice, for_every_shape
from neox_hf.kernels.once_differentiable import once_differentiable
from neox_hf.kernels.registration import register, register_fake

PAIR = 2
"""Rows of a tile, since one draw serves two."""


@dataclass(frozen=True)
class BlockWidth:
    """A launch with a program for each block of so many columns of a pair of rows."""

    width: int


def _narrower_blocks(columns: int) -> tuple[BlockWidth, ...]:
    return tuple(BlockWidth(width) for width in WIDTHS if width <= block_width(columns))


FORWARD = LaunchChoice("bias_dropout_residual_forward", _narrower_blocks)
BACKWARD = LaunchChoice("dropout_backward", for_every_shape(*(SummingTiles(PAIR, warps) for warps in (16, 8, 32, 48))))


def draw_dropout_seed(device: torch.device) -> Tensor:
    """An int64 [1] from the device's default generator: no wait for the device, and anew in each replay of a graph."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def bias_dropout_residual_reference(
    x: Tensor,
    first: Tensor,
    bias1: Tensor | None,
    second: Tensor | None,
    bias2: Tensor | None,
    probability: float,
    seed: Tensor | None,
) -> Tensor:
    """The same distribution of masks as the kernel's, drawn by torch; of the seed counts only whether there is one."""
    dtype = _result_dtype(x, first, second)
    total = x.to(torch.promote_types(dtype, torch.float32))
    for branch, bias in ((first, bias1), (second, bias2)):
        if branch is not None:
            value = branch.to(total.dtype) if bias is None else branch.to(total.dtype) + bias
            total = total + (value if seed is None else F.dropout(value, probability))
    return total.to(dtype)


def _result_dtype(x: Tensor, first: Tensor, second: Tensor | None) -> torch.dtype:
    dtype = torch.promote_types(x.dtype, first.dtype)
    return dtype if second is None else torch.promote_types(dtype, second.dtype)


@triton.jit
def _draw(seed, pair, column):
    """Four random words for each of the columns, of this pair of rows."""
    zero = 0 * column
    return tl.philox(tl.load(seed), column, pair + zero, zero, zero, 7)


@triton.jit
def _branch(values, bias, at, inside, column, columns, word, drop_below, scale):
    if values is not None:
        value = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    else:
        value = tl.zeros_like(at).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    if word is not None:
        value = tl.where(word >= drop_below, value * scale, 0.0)
    return value


@triton.jit
def _forward_kernel(
    x, first, bias1, second, bias2, y, seed, drop_below, scale, rows, columns, blocks, WIDTH: tl.constexpr
):
    """A program takes a block of columns of one pair of rows."""
    pair = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    if seed is not None:
        even1, even2, odd1, odd2 = _draw(seed, pair, column)
    else:
        even1, even2, odd1, odd2 = None, None, None, None
    drop_below = tl.cast(drop_below, tl.uint32)
    for half in tl.static_range(2):
        row = 2 * pair + half
        inside = (row + 0 * column < rows) & (column < columns)
        at = row.to(tl.int64) * columns + column
        total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        word = even1 if half == 0 else odd1
        total += _branch(first, bias1, at, inside, column, columns, word, drop_below, scale)
        if second is not None or bias2 is not None:
            word = even2 if half == 0 else odd2
            total += _branch(second, bias2, at, inside, column, columns, word, drop_below, scale)
        tl.store(y + at, total, mask=inside)


@triton.jit
def _pass_on(upstream, gradient, at, inside, word, drop_below, scale):
    """One branch's share of the upstream gradient, stored where it is asked for."""
    value = tl.where(word >= drop_below, upstream * scale, 0.0)
    if gradient is not None:
        tl.store(gradient + at, value, mask=inside)
    return value


@triton.jit
def _backward_kernel(
    dy, first, second, partial, seed, drop_below, scale, rows, columns, blocks, slabs, WIDTH: tl.constexpr
):
    """Gradients of the branches and, where `partial` [slabs, 2, columns] is given, their sums over this slab's rows."""
    slab = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    drop_below = tl.cast(drop_below, tl.uint32)
    sums1 = tl.zeros([WIDTH], tl.float32)
    sums2 = tl.zeros([WIDTH], tl.float32)
    for pair in range(slab, (rows + 1) // 2, slabs):
        even1, even2, odd1, odd2 = _draw(seed, pair, column)
        for half in tl.static_range(2):
            row = 2 * pair + half
            inside = (row + 0 * column < rows) & (column < columns)
            at = tl.cast(row, tl.int64) * columns + column
            upstream = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
            word1 = even1 if half == 0 else odd1
            word2 = even2 if half == 0 else odd2
            sums1 += _pass_on(upstream, first, at, inside, word1, drop_below, scale)
            sums2 += _pass_on(upstream, second, at, inside, word2, drop_below, scale)
    if partial is not None:
        at = partial + slab * 2 * columns + column
        tl.store(at, sums1, mask=column < columns)
        tl.store(at + columns, sums2, mask=column < columns)


def _dropout_numbers(probability: float) -> tuple[int, float]:
    """The words below which an element is dropped, and what scales the others."""
    return min(round(probability * 2**32), 2**32 - 1), 0.0 if probability == 1 else 1 / (1 - probability)


@register("bias_dropout_residual_forward")
def _forward(
    x: Tensor,
    first: Tensor,
    bias1: Tensor | None,
    second: Tensor | None,
    bias2: Tensor | None,
    probability: float,
    seed: Tensor | None,
) -> Tensor:
    y = torch.empty(x.shape, dtype=_result_dtype(x, first, second), device=x.device)
    _launch_forward(y, (x, first, bias1, second, bias2), probability, seed)
    return y


def _launch_forward(
    y: Tensor, inputs: tuple[Tensor | None, ...], probability: float = 0.0, seed: Tensor | None = None
) -> None:
    """y, contiguous, from x, first, bias1, second, bias2."""
    if y.numel() == 0:
        return
    columns = y.shape[-1]
    rows = y.numel() // columns
    grid = column_grid(rows, columns, PAIR, width=FORWARD.chosen(y.device, y.dtype, columns).width)
    _forward_kernel[grid.programs](
        *[tensor if tensor is None else tensor.contiguous() for tensor in inputs],
        y,
        seed,
        *_dropout_numbers(probability),
        rows,
        columns,
        grid.blocks,
        WIDTH=grid.width,
        num_warps=grid.warps,
    )


@register_fake(_forward)
def _(
    x: Tensor,
    first: Tensor,
    bias1: Tensor | None,
    second: Tensor | None,
    bias2: Tensor | None,
    probability: float,
    seed: Tensor | None,
) -> Tensor:
    return torch.empty(x.shape, dtype=_result_dtype(x, first, second), device=x.device)


@register("dropout_backward")
def _dropout_backward(
    dy: Tensor, probability: float, seed: Tensor, branches: int, sum_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one or two branches [..., H] (the second empty if there is one), and their sums [2, H].

    No `sum_dtype`, no sums: an empty tensor.
    """
    dy = dy.contiguous()
    first, second = torch.empty_like(dy), torch.empty_like(dy) if branches == 2 else dy.new_empty(0)
    columns = dy.shape[-1]
    if columns == 0:
        return first, second, dy.new_empty(0 if sum_dtype is None else (2, 0), dtype=sum_dtype or dy.dtype)
    rows = dy.numel() // columns
    launch = BACKWARD.chosen(dy.device, dy.dtype, columns)
    grid = column_grid(rows, columns, launch.rows, multiprocessors(dy.device), launch.warps_in_flight)
    partial = None if sum_dtype is None else dy.new_empty(grid.slabs, 2 * columns, dtype=torch.float32)
    _backward_kernel[grid.programs](
        dy,
        first,
        second if branches == 2 else None,
        partial,
        seed,
        *_dropout_numbers(probability),
        rows,
        columns,
        grid.blocks,
        grid.slabs,
        WIDTH=grid.width,
        num_warps=grid.warps,
    )
    sums = dy.new_empty(0) if partial is None else finish_column_sums(partial, sum_dtype).view(2, columns)
    return first, second, sums


@register_fake(_dropout_backward)
def _(
    dy: Tensor, probability: float, seed: Tensor, branches: int, sum_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    first = torch.empty_like(dy, memory_format=torch.contiguous_format)
    second = torch.empty_like(first) if branches == 2 else dy.new_empty(0)
    return first, second, dy.new_empty(0 if sum_dtype is None else (2, dy.shape[-1]), dtype=sum_dtype or dy.dtype)


class _BiasDropoutResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        first: Tensor,
        bias1: Tensor | None,
        second: Tensor | None,
        bias2: Tensor | None,
        probability: float,
        seed: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.probability = probability
        ctx.branches = 1 if second is None else 2
        ctx.bias_dtypes = [
            gradient_dtype(bias) if wanted else None
            for bias, wanted in zip((bias1, bias2), (ctx.needs_input_grad[2], ctx.needs_input_grad[4]), strict=True)
        ]
        return _forward(x, first, bias1, second, bias2, probability, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        first = second = dy
        if seed is None:
            dbias1, dbias2 = bias_gradients(dy, *ctx.bias_dtypes)
        else:
            sum_dtype = _sum_dtype(*ctx.bias_dtypes)
            first, second, sums = _dropout_backward(dy, ctx.probability, seed, ctx.branches, sum_dtype)
            dbias1, dbias2 = _rounded([None, None] if sum_dtype is None else sums.unbind(), ctx.bias_dtypes)
        return dy, first, dbias1, second if ctx.branches == 2 else None, dbias2, None, None


def _sum_dtype(*dtypes: torch.dtype | None) -> torch.dtype | None:
    """One dtype for both sums, as both biases have but for the oddest models; the other is rounded from it."""
    return next((dtype for dtype in dtypes if dtype is not None), None)


def bias_gradients(
    dy: Tensor, dtype1: torch.dtype | None, dtype2: torch.dtype | None, *, backend: str = "triton"
) -> tuple[Tensor | None, Tensor | None]:
    """Of both biases without dropout, in one pass; None for one that wants none."""
    sum_dtype = _sum_dtype(dtype1, dtype2)
    if sum_dtype is None:
        return None, None
    has_kernel = BIAS_DROPOUT_RESIDUAL.has_kernel_for(backend, dy)
    total = column_sums(dy, sum_dtype) if has_kernel else dy.flatten(0, -2).sum(0, dtype=sum_dtype)
    return _rounded([total, total], (dtype1, dtype2))


def _rounded(sums: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]) -> tuple[Tensor | None, ...]:
    """Each sum in its bias's dtype; None for a bias that wants none."""
    return tuple(None if dtype is None else total.to(dtype) for total, dtype in zip(sums, dtypes, strict=True))


def bias_dropout_residual_triton(
    x: Tensor,
    first: Tensor,
    bias1: Tensor | None,
    second: Tensor | None,
    bias2: Tensor | None,
    probability: float,
    seed: Tensor | None,
) -> Tensor:
    """The kernels, differentiable in all but the seed."""
    return _BiasDropoutResidual.apply(x, first, bias1, second, bias2, probability, seed if probability > 0 else None)


BIAS_DROPOUT_RESIDUAL = Op(
    "bias_dropout_residual", torch=bias_dropout_residual_reference, triton=bias_dropout_residual_triton
)


def fill_residual_(
    out: Tensor,
    x: Tensor,
    first: Tensor,
    second: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None],
    *,
    backend: str = "auto",
) -> None:
    """out = x + first [+ second] + biases, for a caller that knows the gradients. out: contiguous, [..., H]."""
    bias1, bias2 = biases
    if BIAS_DROPOUT_RESIDUAL.has_kernel_for(backend, x):
        _launch_forward(out, (x, first, bias1, second, bias2))
        return
    second = torch.zeros_like(first) if second is None else second
    out.copy_(bias_dropout_residual_reference(x, first, bias1, second, bias2, 0.0, None))


def bias_dropout_residual(
    x: Tensor,
    first: Tensor,
    bias1: Tensor | None = None,
    second: Tensor | None = None,
    bias2: Tensor | None = None,
    probability: float = 0.0,
    seed: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Add one branch [..., H], or two, each with its bias [H] and its own dropout, to the residual stream x [..., H].

    seed: int64 [1] on x's device, from `draw_dropout_seed`; equal seeds make equal masks, other than in the reference,
    which draws its own. Without it, or at probability 0, nothing is dropped.

    Raises:
        ValueError: a probability outside 0 to 1, a bias without its branch, or shapes that do not fit.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"dropout of {probability} is no probability; it lies between 0 and 1")
    if second is None and bias2 is not None:
        raise ValueError("bias_dropout_residual was given bias2 without second, the branch that it belongs to")
    for name, tensor, shape in (
        ("first", first, x.shape),
        ("second", second, x.shape),
        ("bias1", bias1, x.shape[-1:]),
        ("bias2", bias2, x.shape[-1:]),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"bias_dropout_residual was given {name} {list(tensor.shape)} for x {list(x.shape)}; "
                f"it wants {list(shape)}"
            )
    implementation = BIAS_DROPOUT_RESIDUAL.choose(backend, x)
    return implementation(x, first, bias1, second, bias2, probability, seed)
