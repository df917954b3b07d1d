"""Eight-bit floats: what a tensor in them is, and how a kernel writes one.

    q = round(clamp(x * scale, -largest, largest))        x ~ q * inverse,  inverse = 1 / scale

An eight-bit product reads both factors along the dimension it sums over, and knows no transposed reading. So a tensor
is needed twice: as it is, for products over its columns, and transposed, for those over its rows. Both are written by
who has the values in registers, together with the largest magnitude, from which later scales are made.

What is not finite becomes NaN, never the largest number: a loss or a gradient norm must show it. It does not count as
a magnitude, or one bad batch would spoil the scales of many.

e4m3 (largest 448, four significant bits) is for activations and weights, e5m2 (57344, three) for gradients. Source:
Micikevicius et al., 2022, "FP8 Formats for Deep Learning", arXiv 2209.05433.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from neox_hf.kernels.language import interprets, tl, triton

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

MULTIPLE = 16
"""Elements, 16 bytes, that every dimension of a product's factors must be a multiple of."""

ROWS, COLUMNS, WARPS = 64, 64, 4
"""A program's tile: both ways of writing it take whole sectors of memory, 64 bytes in a row, 16 a thread. Of programs
with four warps an H200's multiprocessor holds 5 that cast and 3 that undo GELU (148 registers a thread): 40 to 48 KB on
their way, where 23 hide the latency of its memory."""


@dataclass(frozen=True)
class Fp8Tensor:
    """x [T, C] in eight bits.

    rows: [T, C], for products over C; columns: [C, T rounded up to 16], zeros at the end, for products over T; each
    where it was asked for. inverse: [1], fp32, what their numbers are to be multiplied by.
    """

    rows: Tensor | None
    columns: Tensor | None
    inverse: Tensor

    def dequantised(self) -> Tensor:
        """x in fp32, from `rows`."""
        return self.rows.float() * self.inverse


def largest(dtype: torch.dtype) -> float:
    """The largest number of `dtype`."""
    return torch.finfo(dtype).max


def mantissa(dtype: torch.dtype) -> int:
    """Bits behind the binary point of `dtype`."""
    return {E4M3: 3, E5M2: 2}[dtype]


def padded(rows: int) -> int:
    """Length of a column of `columns`."""
    return -(-rows // MULTIPLE) * MULTIPLE


def empty_fp8(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device=device)


def tiles(rows: int, columns: int) -> tuple[int]:
    """The grid of a kernel that `store_fp8`s [rows, columns]; padding included, since ROWS is a multiple of 16."""
    return (-(-rows // ROWS) * -(-columns // COLUMNS),)


def kernel_view(x: Tensor | None) -> Tensor | None:
    """x as a kernel takes it. Triton's interpreter truncates, and loses NaN: there bytes are written, made by hand."""
    return x.view(torch.uint8) if x is not None and interprets() else x


def quantised_reference(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, as `store_fp8` rounds it."""
    scaled = (x.float() * scale).clamp(-largest(dtype), largest(dtype))
    return torch.where(x.isfinite(), scaled, torch.nan).to(dtype)


def store_reference(
    x: Tensor, scale: Tensor, rows: Tensor | None, columns: Tensor | None, amax: Tensor | None = None
) -> None:
    """What `store_fp8` does, for all of x [T, C]. rows, columns: as in an `Fp8Tensor`. amax [1] grows."""
    if amax is not None and x.numel():
        finite = torch.where(x.isfinite(), x, 0).abs().amax().float()
        amax.copy_(torch.maximum(amax, finite))
    if rows is not None:
        rows.copy_(quantised_reference(x, scale, rows.dtype))
    if columns is not None:
        columns.zero_()
        columns[:, : x.shape[0]] = quantised_reference(x, scale, columns.dtype).t()


@triton.jit
def _bytes_of(x, LARGEST: tl.constexpr, MANTISSA: tl.constexpr):
    """The bytes of x in fp32, within +-LARGEST or NaN, rounded to nearest, ties to even: what hardware does in one."""
    BIAS: tl.constexpr = 7 if MANTISSA == 3 else 15
    SHIFT: tl.constexpr = 23 - MANTISSA
    magnitude = tl.abs(x)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = (bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1)) >> SHIFT
    normal -= (127 - BIAS) << MANTISSA
    # Added to a number whose last bit is worth the smallest step, a magnitude is rounded to steps by the addition.
    STEPS: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    small = (magnitude + STEPS).to(tl.int32, bitcast=True) - ((127 + 24 - BIAS - MANTISSA) << 23)
    code = tl.where(magnitude < 2.0 ** (1 - BIAS), small, normal)
    code = tl.where(magnitude <= LARGEST, code, 0x7F)
    return (code | tl.where(x < 0, 0x80, 0)).to(tl.uint8)


@triton.jit
def _quantised(x, scale, element: tl.constexpr, LARGEST: tl.constexpr, MANTISSA: tl.constexpr):
    scaled = x * scale
    scaled = tl.where(scaled > LARGEST, LARGEST, tl.where(scaled < -LARGEST, -LARGEST, scaled))
    scaled = tl.where(tl.abs(x) < float("inf"), scaled, float("nan"))
    return _bytes_of(scaled, LARGEST, MANTISSA) if element == tl.uint8 else scaled.to(element)


@triton.jit
def tile_of(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """First row and column of this program's tile. Neighbours lie in one row: they fill each other's cache lines."""
    blocks = tl.cdiv(columns, COLUMNS)
    return tl.program_id(0) // blocks * ROWS, tl.program_id(0) % blocks * COLUMNS


@triton.jit
def load_tile(x, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of the contiguous x [rows, columns] in fp32, zero outside."""
    line, place = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (line < rows - row) & (place < columns - column)
    start = row.to(tl.int64) * columns + column
    return tl.load(x + start + line * columns + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_fp8(
    values,
    scale,
    as_rows,
    as_columns,
    row,
    column,
    rows,
    columns,
    padded,
    LARGEST: tl.constexpr,
    MANTISSA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes fp32 values [ROWS, COLUMNS], zero outside, into as_rows and as_columns, each where there is one."""
    factor = tl.load(scale)
    line, place = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    if as_rows is not None:
        inside = (line[:, None] < rows - row) & (place[None, :] < columns - column)
        at = row.to(tl.int64) * columns + column + line[:, None] * columns + place[None, :]
        tl.store(as_rows + at, _quantised(values, factor, as_rows.dtype.element_ty, LARGEST, MANTISSA), mask=inside)
    if as_columns is not None:
        inside = (place[:, None] < columns - column) & (line[None, :] < padded - row)
        at = column.to(tl.int64) * padded + row + place[:, None].to(tl.int64) * padded + line[None, :]
        code = _quantised(values, factor, as_columns.dtype.element_ty, LARGEST, MANTISSA)
        tl.store(as_columns + at, tl.trans(code), mask=inside)


@triton.jit
def note_amax(values, amax):
    """Raise amax [1] to the largest finite magnitude among `values`: few programs find it lower than theirs."""
    magnitude = tl.abs(values)
    top = tl.max(tl.max(tl.where(magnitude < float("inf"), magnitude, 0.0), axis=1), axis=0)
    tl.atomic_max(amax, top, mask=top > tl.load(amax), sem="relaxed")
