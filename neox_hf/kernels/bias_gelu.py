"""Bias and GELU.

    z = x + bias
    erf form:   y = z Phi(z) = z/2 (1 + erf(z / sqrt 2))
    tanh form:  y = z s(z) = z/2 (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))),  s(z) = sigmoid of twice that argument

Shapes: x [..., F], bias [F]; returns [..., F] in x's dtype, computed in fp32 and rounded once.
Source: Hendrycks and Gimpel, 2016, arXiv 1606.08415. GPT-NeoX's `bias_gelu_fusion` is the tanh form; released Pythia
configurations say the erf form, 20B's the tanh form (`gelu_fast`).

The kernels read and write every element once. What they keep for the backward pass is x, without the bias; that pass
sums the bias's gradient while it writes x's, and can write y again for whoever did not keep it.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from neox_hf.kernels import gelu_forms
from neox_hf.kernels.column_sums import SummingTiles, column_grid, finish_column_sums
from neox_hf.kernels.devices import multiprocessors
from neox_hf.kernels.dispatch import Op
from neox_hf.kernels.gradient_dtype import gradient_dtype
from neox_hf.kernels.language import tl, triton
from neox_hf.kernels.late_tensor import LateTensor, late_tensors, mark
from neox_hf.kernels.launch_choice import LaunchChoice, for_every_shape
from neox_hf.kernels.once_differentiable import once_differentiable
from neox_hf.kernels.registration import register, register_fake

GeluForm = Literal["erf", "tanh"]
TORCH_FORMS: dict[str, str] = {"erf": "none", "tanh": "tanh"}

TILE_ROWS = 2
"""Rows of a tile: as many loads of 16 bytes are under way for every lane and input. On an H200 one takes a tenth longer
and four take 3 % (forward, with a bias) to 17 % (backward) longer."""

WARPS_IN_FLIGHT = 32
"""Warps per multiprocessor where programs hold sums, whose two rows are half of what other sums have under way."""


@dataclass(frozen=True)
class TileRows:
    """A launch with a program for each tile of so many rows."""

    rows: int


@dataclass(frozen=True)
class Block:
    """A launch with a program of so many warps for each block of so many elements."""

    elements: int
    warps: int


FORWARD = LaunchChoice("bias_gelu_forward", for_every_shape(*map(TileRows, (TILE_ROWS, 1, 4, 8))))
FORWARD_ALONE = LaunchChoice(
    "gelu_forward", for_every_shape(Block(2048, 4), Block(1024, 4), Block(4096, 8), Block(8192, 8))
)
BACKWARD = LaunchChoice("gelu_backward", for_every_shape(*map(TileRows, (TILE_ROWS, 1, 4))))
BACKWARD_WITH_SUMS = LaunchChoice(
    "bias_gelu_backward",
    for_every_shape(
        SummingTiles(TILE_ROWS, WARPS_IN_FLIGHT),
        SummingTiles(1, 32),
        SummingTiles(1, 48),
        SummingTiles(2, 16),
        SummingTiles(2, 48),
        SummingTiles(4, 16),
    ),
)


def bias_gelu_reference(x: Tensor, bias: Tensor | None, form: str, makes_again: bool = False) -> Tensor:
    """torch's GELU, which works in fp32 inside; so does the addition of the bias here. Its result is always kept."""
    if bias is None:
        return F.gelu(x, approximate=TORCH_FORMS[form])
    return F.gelu(x.float() + bias.float(), approximate=TORCH_FORMS[form]).to(x.dtype)


# Kernels read constants of this kind alone, one by one, and the interpreter has them on the right of a tensor.
BELL, BELL_AT_ZERO, ERF_STRETCH = map(tl.constexpr, (gelu_forms.BELL, gelu_forms.BELL_AT_ZERO, gelu_forms.ERF_STRETCH))
ERF_TAIL_0, ERF_TAIL_1, ERF_TAIL_2, ERF_TAIL_3, ERF_TAIL_4, ERF_TAIL_5 = map(tl.constexpr, gelu_forms.ERF_TAIL)
TANH_ARGUMENT_0, TANH_ARGUMENT_1 = map(tl.constexpr, gelu_forms.TANH_ARGUMENT)
TANH_SLOPE_0, TANH_SLOPE_1 = map(tl.constexpr, gelu_forms.TANH_SLOPE)


@triton.jit
def _reciprocal(x):
    # Two instructions where a division takes eight; for x >= 1, infinity included, to 2^-21.
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _normal(z, PRECISE: tl.constexpr):
    """Phi(z), and exp(-z^2 / 2).

    In half precision erf, at some thirty instructions, would take longer than the memory does, and 1 + erf has nothing
    left in the tail: there it is `ERF_TAIL`.
    """
    bell = tl.exp2(z * z * BELL)
    if PRECISE:
        below = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
    else:
        t = _reciprocal(tl.abs(z) * ERF_STRETCH + 1.0)
        p = t * ERF_TAIL_5 + ERF_TAIL_4
        p = t * (t * p + ERF_TAIL_3) + ERF_TAIL_2
        p = t * (t * p + ERF_TAIL_1) + ERF_TAIL_0
        tail = bell * (t * p)
        below = tl.where(z > 0, 1.0 - tail, tail)
    return below, bell


@triton.jit
def _sigmoid(z, PRECISE: tl.constexpr):
    """s(z) of the tanh form, and s(z) (1 - s(z)), both without cancellation in either tail."""
    small = tl.exp2(tl.abs(z) * (z * z * TANH_ARGUMENT_1 + TANH_ARGUMENT_0))
    share = 1.0 / (1.0 + small) if PRECISE else _reciprocal(1.0 + small)
    return share * tl.where(z > 0, 1.0, small), small * share * share


@triton.jit
def _gelu_and_slope(z, ERF: tl.constexpr, PRECISE: tl.constexpr):
    """y and dy/dz in fp32; what of them is not used costs nothing."""
    if ERF:
        gate, bell = _normal(z, PRECISE)
        slope = gate + z * bell * BELL_AT_ZERO
    else:
        gate, spread = _sigmoid(z, PRECISE)
        slope = gate + z * spread * (z * z * TANH_SLOPE_1 + TANH_SLOPE_0)
    return z * gate, slope


@triton.jit
def _forward_alone_kernel(x, y, count, ERF: tl.constexpr, BLOCK: tl.constexpr):
    """Without a bias one element is as good as another: no rows, nor columns."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(x + place, mask=place < count, other=0.0).to(tl.float32)
    PRECISE: tl.constexpr = x.dtype.element_ty == tl.float32
    tl.store(y + place, _gelu_and_slope(z, ERF, PRECISE)[0], mask=place < count)


@triton.jit
def _forward_kernel(x, bias, y, rows, columns, blocks, ERF: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) // blocks * ROWS
    column = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    line = tl.arange(0, ROWS)
    inside = (line[:, None] < rows - row) & (column[None, :] < columns)
    offset = line[:, None] * columns + column[None, :]
    start = row.to(tl.int64) * columns
    z = tl.load(x + start + offset, mask=inside, other=0.0).to(tl.float32)
    z += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    PRECISE: tl.constexpr = x.dtype.element_ty == tl.float32
    tl.store(y + start + offset, _gelu_and_slope(z, ERF, PRECISE)[0], mask=inside)


@triton.jit
def _backward_kernel(
    x,
    bias,
    dy,
    dx,
    y,
    partial,
    rows,
    columns,
    blocks,
    slabs,
    ERF: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dx, y again where it is given, and this program's share of the bias's gradient where `partial` is."""
    slab = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    line = tl.arange(0, ROWS)
    offset = line[:, None] * columns + column[None, :]
    shift = tl.zeros([WIDTH], tl.float32)
    if bias is not None:
        shift = tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    PRECISE: tl.constexpr = x.dtype.element_ty == tl.float32
    sums = tl.zeros([WIDTH], tl.float32)
    for row in range(slab * ROWS, rows, slabs * ROWS):
        inside = (line[:, None] < rows - row) & (column[None, :] < columns)
        start = tl.cast(row, tl.int64) * columns
        z = tl.load(x + start + offset, mask=inside, other=0.0).to(tl.float32) + shift[None, :]
        upstream = tl.load(dy + start + offset, mask=inside, other=0.0).to(tl.float32)
        value, slope = _gelu_and_slope(z, ERF, PRECISE)
        gradient = upstream * slope
        tl.store(dx + start + offset, gradient, mask=inside)
        if y is not None:
            tl.store(y + start + offset, value, mask=inside)
        if partial is not None:
            sums += tl.sum(gradient, axis=0)
    if partial is not None:
        tl.store(partial + slab * columns + column, sums, mask=column < columns)


@register("bias_gelu_forward")
def bias_gelu_forward(x: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """GELU of x [..., F] + bias [F]."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    if bias is None:
        launch, count = FORWARD_ALONE.chosen(x.device, x.dtype), x.numel()
        grid = (-(-count // launch.elements),)
        _forward_alone_kernel[grid](x, y, count, ERF=form == "erf", BLOCK=launch.elements, num_warps=launch.warps)
        return y
    columns = x.shape[-1]
    rows = x.numel() // columns
    tile_rows = FORWARD.chosen(x.device, x.dtype, columns).rows
    grid = column_grid(rows, columns, tile_rows)
    _forward_kernel[grid.programs](
        x,
        bias.contiguous(),
        y,
        rows,
        columns,
        grid.blocks,
        ERF=form == "erf",
        ROWS=tile_rows,
        WIDTH=grid.width,
        num_warps=grid.warps,
    )
    return y


@register_fake(bias_gelu_forward)
def _(x: Tensor, bias: Tensor | None, form: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@register("bias_gelu_backward")
def bias_gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, form: str, sum_dtype: torch.dtype | None, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of x [..., F]; of the bias [F] in `sum_dtype`; and y [..., F] if `recompute`, from one reading of x.

    What is not asked for (no `sum_dtype`, no `recompute`) is an empty tensor.
    """
    x, dy = x.contiguous(), dy.contiguous()
    columns = x.shape[-1]
    dx, y = torch.empty_like(x), torch.empty_like(x) if recompute else x.new_empty(0)
    if columns == 0:
        return dx, x.new_empty(0, dtype=sum_dtype or x.dtype), y
    rows = x.numel() // columns
    if sum_dtype is None:
        tile_rows = BACKWARD.chosen(x.device, x.dtype, columns).rows
        grid = column_grid(rows, columns, tile_rows)
    else:  # persistent for the sums' sake alone: without them many small programs keep the memory busier
        launch = BACKWARD_WITH_SUMS.chosen(x.device, x.dtype, columns)
        tile_rows = launch.rows
        grid = column_grid(rows, columns, tile_rows, multiprocessors(x.device), launch.warps_in_flight)
    partial = None if sum_dtype is None else x.new_empty(grid.slabs, columns, dtype=torch.float32)
    _backward_kernel[grid.programs](
        x,
        bias if bias is None else bias.contiguous(),
        dy,
        dx,
        y if recompute else None,
        partial,
        rows,
        columns,
        grid.blocks,
        grid.slabs,
        ERF=form == "erf",
        ROWS=tile_rows,
        WIDTH=grid.width,
        num_warps=grid.warps,
    )
    return dx, x.new_empty(0) if partial is None else finish_column_sums(partial, sum_dtype), y


@register_fake(bias_gelu_backward)
def _(
    dy: Tensor, x: Tensor, bias: Tensor | None, form: str, sum_dtype: torch.dtype | None, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = x.new_empty(0 if sum_dtype is None else x.shape[-1], dtype=sum_dtype or x.dtype)
    return dx, sums, torch.empty_like(dx) if recompute else x.new_empty(0)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, form: str, late: tuple[LateTensor, ...]) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.form, ctx.late = form, late
        ctx.sum_dtype = gradient_dtype(bias) if ctx.needs_input_grad[1] else None
        return bias_gelu_forward(x, bias, form)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        awaited = [late for late in ctx.late if late.is_awaited]
        dx, dbias, y = bias_gelu_backward(dy, x, bias, ctx.form, ctx.sum_dtype, recompute=bool(awaited))
        for late in awaited:
            late.arrive(y)
        return dx, None if ctx.sum_dtype is None else dbias, None, None


def bias_gelu_triton(x: Tensor, bias: Tensor | None, form: str, makes_again: bool = False) -> Tensor:
    """The kernels, differentiable in x and bias."""
    late = late_tensors(1, x) if makes_again else ()
    y = _BiasGelu.apply(x, bias, form, late)
    return mark(y, late[0]) if late else y


BIAS_GELU = Op("bias_gelu", torch=bias_gelu_reference, triton=bias_gelu_triton)


def check_form(form: str) -> None:
    """Raises ValueError unless there is such a form of GELU."""
    if form not in TORCH_FORMS:
        raise ValueError(f"GELU form {form!r} is unknown; choose one of {', '.join(TORCH_FORMS)}")


def bias_gelu(
    x: Tensor, bias: Tensor | None, form: GeluForm, *, makes_again: bool = False, backend: str = "auto"
) -> Tensor:
    """GELU of x [..., F] + bias [F]; `bias=None` when the product that made x has added it already.

    makes_again: the backward kernel makes the result once more, so that linears need not keep it (`late_tensor.py`).

    Raises:
        ValueError: the form is neither erf nor tanh, or the bias does not fit x.
    """
    check_form(form)
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(
            f"bias_gelu was given a bias {list(bias.shape)} for x {list(x.shape)}; it wants [F] for [..., F]"
        )
    return BIAS_GELU.choose(backend, x)(x, bias, form, makes_again)
