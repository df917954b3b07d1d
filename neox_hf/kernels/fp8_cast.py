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
    COLUMNS,
    ROWS,
    WARPS,
    Fp8Tensor,
    empty_fp8,
    kernel_view,
    largest,
    load_tile,
    mantissa,
    note_amax,
    padded,
    store_fp8,
    store_reference,
    tile_of,
    tiles,
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
    LARGEST: tl.constexpr,
    MANTISSA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column = tile_of(rows, columns, ROWS, COLUMNS)
    values = load_tile(x, row, column, rows, columns, ROWS, COLUMNS)
    note_amax(values, amax)
    if partial is not None:
        place = column + tl.arange(0, COLUMNS)
        tl.store(partial + row // ROWS * columns + place, tl.sum(values, axis=0), mask=place < columns)
    store_fp8(values, scale, as_rows, as_columns, row, column, rows, columns, padded, LARGEST, MANTISSA, ROWS, COLUMNS)


@register("fp8_cast", mutates=("amax", "rows", "columns", "partial"))
def fp8_cast_triton(
    x: Tensor, scale: Tensor, amax: Tensor, rows: Tensor | None, columns: Tensor | None, partial: Tensor | None
) -> None:
    """The kernel; `partial` is [tiles of ROWS rows, C]."""
    out = rows if rows is not None else columns
    if x.numel() == 0 or out is None:
        return
    _cast_kernel[tiles(*x.shape)](
        x.contiguous(),
        scale,
        amax,
        kernel_view(rows),
        kernel_view(columns),
        partial,
        *x.shape,
        padded(x.shape[0]),
        LARGEST=largest(out.dtype),
        MANTISSA=mantissa(out.dtype),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
    )


@register_fake(fp8_cast_triton)
def _(
    x: Tensor, scale: Tensor, amax: Tensor, rows: Tensor | None, columns: Tensor | None, partial: Tensor | None
) -> None:
    return None


FP8_CAST = Op("fp8_cast", torch=fp8_cast_reference, triton=fp8_cast_triton)


def partial_sums(x: Tensor) -> Tensor:
    """Room for the sums of each tile of x [T, C]: zeros only where there is no tile."""
    blocks = -(-x.shape[0] // ROWS)
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
