"""A tensor rounded to eight bits, as it is and transposed, in one reading.

    rows_tc = columns_ct = q(x_tc * scale)        amax = max(amax, max |x|)        sums_c = sum over t of x_tc

Shapes: x [T, C]; the rest as in `fp8_format`. The sums are a bias's gradient where x is an output's.

A byte is read once and written once: 2 + 1 + 1 for half precision.
"""

import torch
from torch import Tensor

from neox_hf.kernels.column_sums import finish_column_sums
from neox_hf.kernels.dispatch import Op
from neox_hf.kernels.fp8_format import (
    TILE,
    Fp8Tensor,
    Tile,
    empty_fp8,
    format_constants,
    kernel_view,
    load_parts,
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


def fp8_cast_reference(
    x: Tensor, scale: Tensor, amax: Tensor, rows: Tensor | None, columns: Tensor | None, partial: Tensor | None
) -> None:
    """Fills rows, columns, and partial [any, C], whose sum over dim 0 is that of x, each where there is one."""
    store_reference(x, scale, rows, columns, amax)
    if partial is not None:
        partial.zero_()
        partial[0] = x.float().sum(0)


@triton.jit
def cast_tile(
    x,
    scale,
    amax,
    as_rows,
    as_columns,
    partial,
    row,
    column,
    rows,
    columns,
    padded,
    MANTISSA: tl.constexpr,
    BY_HAND: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Everything for the tile at (row, column)."""
    parts = load_parts(x, row, column, rows, columns, WHOLE, ROWS, COLUMNS)
    factor = tl.load(scale)
    top = tl.zeros([ROWS // 4, COLUMNS], tl.float32)
    sums = tl.zeros([ROWS // 4, COLUMNS], tl.float32)
    scaled = ()
    for part in tl.static_range(4):
        values = parts[part].to(tl.float32)
        sums += values
        values = without_infinity(values)
        top = tl.maximum(top, tl.abs(values))
        scaled += (values * factor,)
        if as_rows is not None:
            code = to_code(scaled[part], MANTISSA, BY_HAND)
            store_part(code, as_rows, row, column, rows, columns, part, WHOLE, ROWS, COLUMNS)
    if as_columns is not None:
        words = to_words(scaled, MANTISSA, BY_HAND)
        store_words(words, as_columns, row, column, columns, padded, WHOLE, ROWS, COLUMNS)
    if partial is not None:
        place = column + tl.arange(0, COLUMNS)
        tl.store(partial + row // ROWS * columns + place, tl.sum(sums, axis=0), mask=place < columns)
    note_amax(top, amax)


@triton.jit
def _cast_kernel(
    x,
    scale,
    amax,
    as_rows,
    as_columns,
    partial,
    rows,
    columns,
    padded,
    MANTISSA: tl.constexpr,
    BY_HAND: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column = tile_of(columns, ROWS, COLUMNS)
    cast_tile(
        x,
        scale,
        amax,
        as_rows,
        as_columns,
        partial,
        row,
        column,
        rows,
        columns,
        padded,
        MANTISSA,
        BY_HAND,
        WHOLE,
        ROWS,
        COLUMNS,
    )


def launch_cast(
    x: Tensor,
    scale: Tensor,
    amax: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    partial: Tensor | None,
    tile: Tile,
) -> None:
    """The kernel, in tiles of `tile`; `partial` is [tiles down, C]."""
    out = rows if rows is not None else columns
    if x.numel() == 0 or out is None:
        return
    _cast_kernel[tile.grid(*x.shape)](
        x.contiguous(),
        scale,
        amax,
        kernel_view(rows),
        word_view(columns),
        partial,
        *x.shape,
        padded(x.shape[0]),
        **format_constants(out.dtype),
        **tile.constants(*x.shape),
    )


@register("fp8_cast", mutates=("amax", "rows", "columns", "partial"))
def fp8_cast_triton(
    x: Tensor, scale: Tensor, amax: Tensor, rows: Tensor | None, columns: Tensor | None, partial: Tensor | None
) -> None:
    launch_cast(x, scale, amax, rows, columns, partial, TILE)


@register_fake(fp8_cast_triton)
def _(
    x: Tensor, scale: Tensor, amax: Tensor, rows: Tensor | None, columns: Tensor | None, partial: Tensor | None
) -> None:
    return None


FP8_CAST = Op("fp8_cast", torch=fp8_cast_reference, triton=fp8_cast_triton)


def partial_sums(x: Tensor, tile: Tile = TILE) -> Tensor:
    """Room for the sums of each tile of x [T, C]: zeros only where there is no tile."""
    blocks = -(-x.shape[0] // tile.rows)
    shape, device = (max(blocks, 1), x.shape[1]), x.device
    make = torch.empty if blocks else torch.zeros
    return make(shape, dtype=torch.float32, device=device)


def finished(partial: Tensor, dtype: torch.dtype, kernel: bool) -> Tensor:
    """The sums [C] of partial [n, C], by the kernel if there is one."""
    return finish_column_sums(partial, dtype) if kernel else partial.sum(0).to(dtype)


def fp8_cast(
    x: Tensor,
    slot: ScaleSlot,
    *,
    rows: bool = True,
    columns: bool = True,
    sum_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Fp8Tensor, Tensor | None]:
    """x [T, C] in the slot's format, and the sums [C] over T if `sum_dtype` says in what."""
    count, width = x.shape
    scale, inverse = slot.for_values(x)
    as_rows = empty_fp8(count, width, slot.dtype, x.device) if rows else None
    as_columns = empty_fp8(width, padded(count), slot.dtype, x.device) if columns else None
    partial = None if sum_dtype is None else partial_sums(x)
    FP8_CAST.choose(backend, x)(x, scale, slot.amax, as_rows, as_columns, partial)
    sums = None if partial is None else finished(partial, sum_dtype, FP8_CAST.has_kernel_for(backend, x))
    return Fp8Tensor(as_rows, as_columns, inverse), sums
