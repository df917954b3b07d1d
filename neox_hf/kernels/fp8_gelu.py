"""Bias and GELU between two eight-bit products.

    y = gelu(x + bias), rounded to eight bits for the product behind it
    dx = dy * gelu'(x + bias), rounded to eight bits for the products before it; dbias = sum over t of dx_t

Shapes: x, dy [T, F], bias [F] or None; computed in fp32. What each form is: `bias_gelu`, whose arithmetic this is.

Forward reads 2 bytes of half precision and writes 1: y transposed, which only the backward pass needs, is made there
from x, which that pass reads anyway. It reads 4 and writes 3. That is what GELU alone moves in half precision, so the
casts of the four largest tensors of a block are free.
"""

import torch
from torch import Tensor

from neox_hf.kernels.bias_gelu import (
    BIAS_GELU,
    TORCH_FORMS,
    _gelu_and_slope,
    bias_gelu_reference,
)
from neox_hf.kernels.dispatch import Op
from neox_hf.kernels.fp8_cast import finished, fp8_cast, partial_sums
from neox_hf.kernels.fp8_format import (
    TILE,
    Fp8Tensor,
    Tile,
    empty_fp8,
    format_constants,
    is_inside,
    kernel_view,
    load_parts,
    mantissa,
    note_amax,
    padded,
    store_part,
    store_reference,
    store_words,
    tile_of,
    to_code,
    to_words,
    without_infinity,
    word_view,
)
from neox_hf.kernels.fp8_scales import ScaleSlot
from neox_hf.kernels.language import tl, triton
from neox_hf.kernels.registration import register, register_fake

FORWARD_TILE = Tile(16, 512, 8)
"""Wide, since nothing is transposed."""

BACKWARD_TILE = TILE


def gelu_forward_reference(
    x: Tensor, bias: Tensor | None, form: str, scale: Tensor, amax: Tensor, rows: Tensor
) -> None:
    """Fills rows [T, F] with y in eight bits."""
    y = bias_gelu_reference(x.float(), bias, form)
    store_reference(y, scale, rows, None, amax)


def gelu_backward_reference(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    form: str,
    scale: Tensor,
    amax: Tensor,
    rows: Tensor,
    columns: Tensor,
    y_scale: Tensor,
    y_columns: Tensor,
    partial: Tensor | None,
) -> None:
    """Fills rows and columns with dx, y_columns with y, and partial [any, F], whose sum over dim 0 is dbias."""
    z = x.float() if bias is None else x.float() + bias.float()
    store_reference(bias_gelu_reference(z, None, form), y_scale, None, y_columns)
    dx = torch.ops.aten.gelu_backward(dy.float(), z, approximate=TORCH_FORMS[form])
    store_reference(dx, scale, rows, columns, amax)
    if partial is not None:
        partial.zero_()
        partial[0] = dx.sum(0)


@triton.jit
def _load_bias(bias, column, columns, COLUMNS: tl.constexpr):
    if bias is None:
        return tl.zeros([1, COLUMNS], tl.float32)
    else:  # what follows a `return` is compiled too, and there is nothing to add to None
        place = column + tl.arange(0, COLUMNS)
        return tl.load(bias + place, mask=place < columns, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _shifted(
    x,
    shift,
    row,
    column,
    rows,
    columns,
    PART: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    z = x.to(tl.float32) + shift
    if WHOLE:
        return z
    # Rows beyond the last have a bias too, but are to be zero.
    return tl.where(is_inside(row, column, rows, columns, PART, ROWS, COLUMNS), z, 0.0)


@triton.jit
def _forward_kernel(
    x,
    bias,
    scale,
    amax,
    as_rows,
    rows,
    columns,
    ERF: tl.constexpr,
    MANTISSA: tl.constexpr,
    BY_HAND: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column = tile_of(columns, ROWS, COLUMNS)
    parts = load_parts(x, row, column, rows, columns, WHOLE, ROWS, COLUMNS)
    shift = _load_bias(bias, column, columns, COLUMNS)
    factor = tl.load(scale)
    top = tl.zeros([ROWS // 4, COLUMNS], tl.float32)
    for part in tl.static_range(4):
        z = _shifted(parts[part], shift, row, column, rows, columns, part, WHOLE, ROWS, COLUMNS)
        y = without_infinity(_gelu_and_slope(z, ERF, x.dtype.element_ty == tl.float32)[0])
        top = tl.maximum(top, tl.abs(y))
        code = to_code(y * factor, MANTISSA, BY_HAND)
        store_part(code, as_rows, row, column, rows, columns, part, WHOLE, ROWS, COLUMNS)
    note_amax(top, amax)


@triton.jit
def _backward_kernel(
    dy,
    x,
    bias,
    scale,
    amax,
    as_rows,
    as_columns,
    y_scale,
    y_columns,
    partial,
    rows,
    columns,
    padded,
    ERF: tl.constexpr,
    MANTISSA: tl.constexpr,
    Y_MANTISSA: tl.constexpr,
    BY_HAND: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column = tile_of(columns, ROWS, COLUMNS)
    parts = load_parts(x, row, column, rows, columns, WHOLE, ROWS, COLUMNS)
    upstream = load_parts(dy, row, column, rows, columns, WHOLE, ROWS, COLUMNS)
    shift = _load_bias(bias, column, columns, COLUMNS)
    factor, y_factor = tl.load(scale), tl.load(y_scale)
    top = tl.zeros([ROWS // 4, COLUMNS], tl.float32)
    sums = tl.zeros([ROWS // 4, COLUMNS], tl.float32)
    scaled, y_scaled = (), ()
    for part in tl.static_range(4):
        z = _shifted(parts[part], shift, row, column, rows, columns, part, WHOLE, ROWS, COLUMNS)
        y, slope = _gelu_and_slope(z, ERF, x.dtype.element_ty == tl.float32)
        y_scaled += (without_infinity(y) * y_factor,)
        dx = upstream[part].to(tl.float32) * slope
        sums += dx
        dx = without_infinity(dx)
        top = tl.maximum(top, tl.abs(dx))
        scaled += (dx * factor,)
        code = to_code(scaled[part], MANTISSA, BY_HAND)
        store_part(code, as_rows, row, column, rows, columns, part, WHOLE, ROWS, COLUMNS)
    words, y_words = to_words(scaled, MANTISSA, BY_HAND), to_words(y_scaled, Y_MANTISSA, BY_HAND)
    store_words(words, as_columns, row, column, columns, padded, WHOLE, ROWS, COLUMNS)
    store_words(y_words, y_columns, row, column, columns, padded, WHOLE, ROWS, COLUMNS)
    if partial is not None:
        place = column + tl.arange(0, COLUMNS)
        tl.store(partial + row // ROWS * columns + place, tl.sum(sums, axis=0), mask=place < columns)
    note_amax(top, amax)


def launch_gelu_forward(
    x: Tensor, bias: Tensor | None, form: str, scale: Tensor, amax: Tensor, rows: Tensor, tile: Tile
) -> None:
    if x.numel() == 0:
        return
    _forward_kernel[tile.grid(*x.shape)](
        x.contiguous(),
        bias if bias is None else bias.contiguous(),
        scale,
        amax,
        kernel_view(rows),
        *x.shape,
        ERF=form == "erf",
        **format_constants(rows.dtype),
        **tile.constants(*x.shape),
    )


@register("fp8_gelu_forward", mutates=("amax", "rows"))
def gelu_forward_triton(x: Tensor, bias: Tensor | None, form: str, scale: Tensor, amax: Tensor, rows: Tensor) -> None:
    launch_gelu_forward(x, bias, form, scale, amax, rows, FORWARD_TILE)


@register_fake(gelu_forward_triton)
def _(x: Tensor, bias: Tensor | None, form: str, scale: Tensor, amax: Tensor, rows: Tensor) -> None:
    return None


def launch_gelu_backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    form: str,
    scale: Tensor,
    amax: Tensor,
    rows: Tensor,
    columns: Tensor,
    y_scale: Tensor,
    y_columns: Tensor,
    partial: Tensor | None,
    tile: Tile,
) -> None:
    if x.numel() == 0:
        return
    _backward_kernel[tile.grid(*x.shape)](
        dy.contiguous(),
        x.contiguous(),
        bias if bias is None else bias.contiguous(),
        scale,
        amax,
        kernel_view(rows),
        word_view(columns),
        y_scale,
        word_view(y_columns),
        partial,
        *x.shape,
        padded(x.shape[0]),
        ERF=form == "erf",
        Y_MANTISSA=mantissa(y_columns.dtype),
        **format_constants(rows.dtype),
        **tile.constants(*x.shape),
    )


@register("fp8_gelu_backward", mutates=("amax", "rows", "columns", "y_columns", "partial"))
def gelu_backward_triton(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    form: str,
    scale: Tensor,
    amax: Tensor,
    rows: Tensor,
    columns: Tensor,
    y_scale: Tensor,
    y_columns: Tensor,
    partial: Tensor | None,
) -> None:
    launch_gelu_backward(dy, x, bias, form, scale, amax, rows, columns, y_scale, y_columns, partial, BACKWARD_TILE)


@register_fake(gelu_backward_triton)
def _(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    form: str,
    scale: Tensor,
    amax: Tensor,
    rows: Tensor,
    columns: Tensor,
    y_scale: Tensor,
    y_columns: Tensor,
    partial: Tensor | None,
) -> None:
    return None


FP8_GELU = Op("fp8_gelu", torch=gelu_forward_reference, triton=gelu_forward_triton)
FP8_GELU_BACKWARD = Op("fp8_gelu_backward", torch=gelu_backward_reference, triton=gelu_backward_triton)


def gelu_to_fp8(x: Tensor, bias: Tensor | None, form: str, slot: ScaleSlot, *, backend: str = "auto") -> Fp8Tensor:
    """y of x [T, F], as rows alone."""
    if not slot.knows():
        y = BIAS_GELU.choose(backend, x)(x, bias, form)
        return fp8_cast(y, slot, columns=False, backend=backend)[0]
    rows = empty_fp8(*x.shape, slot.dtype, x.device)
    FP8_GELU.choose(backend, x)(x, bias, form, slot.scale, slot.amax, rows)
    return Fp8Tensor(rows, None, slot.inverse)


def gelu_backward_to_fp8(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    form: str,
    slot: ScaleSlot,
    y_slot: ScaleSlot,
    sum_dtype: torch.dtype | None,
    *,
    backend: str = "auto",
) -> tuple[Fp8Tensor, Fp8Tensor, Tensor | None]:
    """dx both ways, in the format of `slot`; y as columns alone, in that of `y_slot`; dbias if `sum_dtype` is given."""
    if not (slot.knows() and y_slot.knows()):
        return _from_own_values(dy, x, bias, form, slot, y_slot, sum_dtype, backend)
    count, width = x.shape
    rows = empty_fp8(count, width, slot.dtype, x.device)
    columns = empty_fp8(width, padded(count), slot.dtype, x.device)
    y_columns = empty_fp8(width, padded(count), y_slot.dtype, x.device)
    partial = None if sum_dtype is None else partial_sums(x, BACKWARD_TILE)
    FP8_GELU_BACKWARD.choose(backend, x)(
        dy, x, bias, form, slot.scale, slot.amax, rows, columns, y_slot.scale, y_columns, partial
    )
    sums = None
    if partial is not None:
        sums = finished(partial, sum_dtype, FP8_GELU_BACKWARD.has_kernel_for(backend, x))
    return Fp8Tensor(rows, columns, slot.inverse), Fp8Tensor(None, y_columns, y_slot.inverse), sums


def _from_own_values(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    form: str,
    slot: ScaleSlot,
    y_slot: ScaleSlot,
    sum_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Fp8Tensor, Fp8Tensor, Tensor | None]:
    """The same where a scale has to be found from the values first: they are written in x's dtype, and read again."""
    z = x.float() if bias is None else x.float() + bias.float()
    y = bias_gelu_reference(z, None, form)
    dx = torch.ops.aten.gelu_backward(dy.float(), z, approximate=TORCH_FORMS[form])
    as_y, _ = fp8_cast(y, y_slot, rows=False, backend=backend)
    as_dx, sums = fp8_cast(dx, slot, sum_dtype=sum_dtype, backend=backend)
    return as_dx, as_y, sums
