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

BYTES = 4
"""In a word: rows of a tile are taken four at a time, one byte of each makes a word, and words are transposed."""


@dataclass(frozen=True)
class Tile:
    """What a program takes: rows, a multiple of 16, by columns. warps: of a program."""

    rows: int
    columns: int
    warps: int

    def grid(self, rows: int, columns: int) -> tuple[int]:
        """Programs for [rows, columns]; padding included, since a tile has a multiple of 16 rows."""
        return (-(-rows // self.rows) * -(-columns // self.columns),)

    def constants(self, rows: int, columns: int) -> dict[str, int | bool]:
        """What a kernel over [rows, columns] is compiled for. WHOLE: no tile reaches outside."""
        whole = rows % self.rows == 0 and columns % self.columns == 0
        return {"WHOLE": whole, "ROWS": self.rows, "COLUMNS": self.columns, "num_warps": self.warps}


TILE = Tile(128, 64, 8)
"""Of kernels that write both ways: a thread loads 16 bytes of half precision for each of four rows before it does
anything, and all it writes lies in pieces of 64 and 128 bytes."""


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


def kernel_view(x: Tensor | None) -> Tensor | None:
    """x as a kernel takes it. Triton's interpreter truncates, and loses NaN: there bytes are written, made by hand."""
    return x.view(torch.uint8) if x is not None and interprets() else x


def word_view(columns: Tensor | None) -> Tensor | None:
    """Columns of an `Fp8Tensor` as a kernel takes them: words of four numbers."""
    return None if columns is None else columns.view(torch.int32)


def format_constants(dtype: torch.dtype) -> dict[str, int | bool]:
    """What a kernel that writes `dtype` is compiled for."""
    return {"MANTISSA": mantissa(dtype), "BY_HAND": interprets()}


def quantised_reference(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, as kernels round it."""
    scaled = (x.float() * scale).clamp(-largest(dtype), largest(dtype))
    return torch.where(x.isfinite(), scaled, torch.nan).to(dtype)


def store_reference(
    x: Tensor, scale: Tensor, rows: Tensor | None, columns: Tensor | None, amax: Tensor | None = None
) -> None:
    """What a kernel writes of x [T, C]. rows, columns: as in an `Fp8Tensor`, of one dtype. amax [1] grows."""
    if amax is not None and x.numel():
        finite = torch.where(x.isfinite(), x, 0).abs().amax().float()
        amax.copy_(torch.maximum(amax, finite))
    out = rows if rows is not None else columns
    if out is None:
        return
    code = quantised_reference(x, scale, out.dtype)
    if rows is not None:
        rows.copy_(code)
    if columns is not None:
        columns[:, : x.shape[0]] = code.t()
        columns[:, x.shape[0] :].zero_()


@triton.jit
def _bytes_of(x, MANTISSA: tl.constexpr):
    """The bytes of x in fp32, rounded to nearest, ties to even, and clamped: what hardware does in one."""
    LARGEST: tl.constexpr = 448.0 if MANTISSA == 3 else 57344.0
    BIAS: tl.constexpr = 7 if MANTISSA == 3 else 15
    SHIFT: tl.constexpr = 23 - MANTISSA
    magnitude = tl.where(x == x, tl.minimum(tl.abs(x), LARGEST), float("nan"))
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
def to_code(scaled, MANTISSA: tl.constexpr, BY_HAND: tl.constexpr):
    """The bytes of `scaled`, finite or NaN, as `without_infinity` makes it; hardware clamps, and keeps NaN."""
    if BY_HAND:
        return _bytes_of(scaled, MANTISSA)
    return scaled.to(tl.float8e4nv if MANTISSA == 3 else tl.float8e5).to(tl.uint8, bitcast=True)


def _word_instructions(pair: str) -> str:
    """PTX that rounds four fp32, operands 1 to 4, to the bytes of a word, the lowest first.

    pair: the type of two. A conversion puts its first source into the upper byte.
    """
    return f"""{{
        .reg .b16 low, high;
        cvt.rn.satfinite.{pair}.f32 low, $2, $1;
        cvt.rn.satfinite.{pair}.f32 high, $4, $3;
        mov.b32 $0, {{low, high}};
    }}"""


_E4M3_WORD = tl.constexpr(_word_instructions("e4m3x2"))
_E5M2_WORD = tl.constexpr(_word_instructions("e5m2x2"))


@triton.jit
def to_words(scaled, MANTISSA: tl.constexpr, BY_HAND: tl.constexpr):
    """Words of four parts, each like one: their bytes, that of the first lowest. scaled: as for `to_code`.

    Rounded anew, by conversions that share nothing with those of `to_code`: a byte that ptxas 12.8 has to take out of
    a pair which a row stores too, it may take out of a register that nothing has written (triton-lang/triton#11111).
    """
    if BY_HAND:
        words = _bytes_of(scaled[0], MANTISSA).to(tl.int32)
        for part in tl.static_range(1, 4):
            words |= _bytes_of(scaled[part], MANTISSA).to(tl.int32) << (8 * part)
        return words
    return tl.inline_asm_elementwise(
        _E4M3_WORD if MANTISSA == 3 else _E5M2_WORD,
        "=r,f,f,f,f",
        [scaled[0], scaled[1], scaled[2], scaled[3]],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def without_infinity(x):
    """x, with NaN in place of what is not finite, in one instruction."""
    return x + x * 0.0


@triton.jit
def tile_of(columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """First row and column of this program's tile. Neighbours lie in one row: they fill each other's cache lines."""
    blocks = tl.cdiv(columns, COLUMNS)
    return tl.program_id(0) // blocks * ROWS, tl.program_id(0) % blocks * COLUMNS


@triton.jit
def part_of(row, column, columns, PART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where every fourth row of a tile, from row PART on, lies in a contiguous [rows, columns]: [ROWS / 4, COLUMNS]."""
    line, place = 4 * tl.arange(0, ROWS // 4) + PART, tl.arange(0, COLUMNS)
    return row.to(tl.int64) * columns + column + line[:, None] * columns + place[None, :]


@triton.jit
def is_inside(row, column, rows, columns, PART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which of them there are."""
    line, place = 4 * tl.arange(0, ROWS // 4) + PART, tl.arange(0, COLUMNS)
    return (line[:, None] < rows - row) & (place[None, :] < columns - column)


@triton.jit
def load_part(
    x,
    row,
    column,
    rows,
    columns,
    PART: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A part of a tile of x as it is, zero outside."""
    at = x + part_of(row, column, columns, PART, ROWS, COLUMNS)
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=is_inside(row, column, rows, columns, PART, ROWS, COLUMNS), other=0.0)


@triton.jit
def load_parts(x, row, column, rows, columns, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile as its four parts: all are on their way before the first is needed."""
    return (
        load_part(x, row, column, rows, columns, 0, WHOLE, ROWS, COLUMNS),
        load_part(x, row, column, rows, columns, 1, WHOLE, ROWS, COLUMNS),
        load_part(x, row, column, rows, columns, 2, WHOLE, ROWS, COLUMNS),
        load_part(x, row, column, rows, columns, 3, WHOLE, ROWS, COLUMNS),
    )


@triton.jit
def store_part(
    code,
    as_rows,
    row,
    column,
    rows,
    columns,
    PART: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes the bytes of a part, as they are."""
    at = as_rows + part_of(row, column, columns, PART, ROWS, COLUMNS)
    code = code.to(as_rows.dtype.element_ty, bitcast=True)
    if WHOLE:
        tl.store(at, code)
    else:
        tl.store(at, code, mask=is_inside(row, column, rows, columns, PART, ROWS, COLUMNS))


@triton.jit
def store_words(
    words,
    as_columns,
    row,
    column,
    columns,
    padded,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes a tile's words [ROWS / 4, COLUMNS], each a byte of four rows, transposed."""
    length = tl.multiple_of(padded // 4, 4)
    line, place = tl.arange(0, ROWS // 4), tl.arange(0, COLUMNS)
    at = as_columns + (column.to(tl.int64) * length + row // 4)
    at += place[:, None].to(tl.int64) * length + line[None, :]
    if WHOLE:
        tl.store(at, tl.trans(words))
    else:
        inside = (place[:, None] < columns - column) & (line[None, :] < length - row // 4)
        tl.store(at, tl.trans(words), mask=inside)


@triton.jit
def note_amax(top, amax):
    """Raise amax [1] to the largest of `top`, magnitudes: few programs find it lower than theirs."""
    most = tl.max(tl.max(top, axis=1), axis=0)
    tl.atomic_max(amax, most, mask=most > tl.load(amax), sem="relaxed")
