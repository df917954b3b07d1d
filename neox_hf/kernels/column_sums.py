"""Sums down the columns of a matrix, always in the same order: what the gradient of a bias is made of.

    sums_h = sum over t of x_th

Shapes: x [..., H], taken as T rows of H; returns [H], summed in fp32.

Two stages, no atomics. A program owns a block of columns and strides over the rows, `slabs` programs to a block; its
sums stay in registers and end as one row of the partial sums [slabs, H]. A second, small kernel adds those up. Kernels
of other ops that sum a gradient while they write it share the grid (`ColumnGrid`) and the second stage.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_hf.kernels.devices import multiprocessors
from neox_hf.kernels.language import tl, triton
from neox_hf.kernels.launch_choice import LaunchChoice, for_every_shape
from neox_hf.kernels.registration import register, register_fake

WARP_COLUMNS = 256
"""Columns of a row that one warp reads at once: 8 a lane, 16 bytes of half precision."""

WIDTHS = (4 * WARP_COLUMNS, 2 * WARP_COLUMNS, WARP_COLUMNS)
"""Columns that a block may have."""

WARPS_IN_FLIGHT = 16
"""Warps per multiprocessor of a persistent grid. With four rows of 16 bytes a lane under way each, that is 32 KB, what
hides the latency of an H200's memory (4.3 TB/s times 0.7 us, over 132 multiprocessors, is 23 KB)."""


@dataclass(frozen=True)
class SummingTiles:
    """A launch whose programs hold sums. rows: of a tile. warps_in_flight: per multiprocessor, which has no more."""

    rows: int
    warps_in_flight: int = WARPS_IN_FLIGHT


COLUMN_SUMS = LaunchChoice(
    "column_sums",
    for_every_shape(
        SummingTiles(8),
        SummingTiles(4),
        SummingTiles(4, 32),
        SummingTiles(8, 32),
        SummingTiles(16),
        SummingTiles(16, 8),
    ),
)


@dataclass(frozen=True)
class ColumnGrid:
    """Programs over blocks of columns, `slabs` of them to a block.

    width: columns in a block. warps: in a program, so that no two warps share a column and sums need no exchange.
    """

    width: int
    warps: int
    blocks: int
    slabs: int

    @property
    def programs(self) -> tuple[int]:
        return (self.blocks * self.slabs,)


def block_width(columns: int) -> int:
    """The widest blocks that leave the fewest lanes idle."""
    return min(WIDTHS, key=lambda width: -(-columns // width) * width)


@functools.lru_cache(1024)
def column_grid(
    rows: int,
    columns: int,
    tile_rows: int,
    multiprocessors: int | None = None,
    warps_in_flight: int = WARPS_IN_FLIGHT,
    width: int | None = None,
) -> ColumnGrid:
    """Blocks of `width` columns, or of `block_width`.

    Persistent where `multiprocessors` is given: no more programs than run at once. Otherwise one for every tile.
    """
    width = width or block_width(columns)
    warps, blocks = width // WARP_COLUMNS, -(-columns // width)
    slabs = -(-rows // tile_rows)
    if multiprocessors is not None:
        slabs = min(slabs, multiprocessors * warps_in_flight // (blocks * warps))
    return ColumnGrid(width, warps, blocks, max(slabs, 1))


@triton.jit
def _partial_sums_kernel(x, partial, rows, columns, blocks, slabs, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    slab = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    line = tl.arange(0, ROWS)
    offset = line[:, None] * columns + column[None, :]
    sums = tl.zeros([WIDTH], tl.float32)
    for row in range(slab * ROWS, rows, slabs * ROWS):
        inside = (line[:, None] < rows - row) & (column[None, :] < columns)
        values = tl.load(x + tl.cast(row, tl.int64) * columns + offset, mask=inside, other=0.0)
        sums += tl.sum(values.to(tl.float32), axis=0)
    tl.store(partial + slab * columns + column, sums, mask=column < columns)


@triton.jit
def _finish_kernel(partial, sums, slabs, columns, SLABS: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    line = tl.arange(0, SLABS)
    total = tl.zeros([SLABS, WIDTH], partial.dtype.element_ty)
    for slab in range(0, slabs, SLABS):
        inside = (line[:, None] < slabs - slab) & (column[None, :] < columns)
        total += tl.load(partial + (slab + line[:, None]) * columns + column[None, :], mask=inside, other=0.0)
    tl.store(sums + column, tl.sum(total, axis=0).to(tl.float32), mask=column < columns)


def finish_column_sums(partial: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> Tensor:
    """The sum [H], or of a `shape` of H elements, in `dtype`, of partial sums [slabs, H] in fp32 or fp64.

    Few columns a program: it is latency that counts.
    """
    slabs, columns = partial.shape
    sums = torch.empty(shape or (columns,), dtype=dtype, device=partial.device)
    width = 32
    _finish_kernel[(-(-columns // width),)](partial, sums, slabs, columns, SLABS=128, WIDTH=width)
    return sums


@register("column_sums")
def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums [H] over all other dimensions of x [..., H], in fp32, rounded once to `dtype`.

    A kernel of Triton: on CUDA, or in its interpreter.
    """
    columns = x.shape[-1]
    if columns == 0:
        return torch.empty(0, dtype=dtype, device=x.device)
    x = x.contiguous()
    rows, launch = x.numel() // columns, COLUMN_SUMS.chosen(x.device, x.dtype, columns)
    grid = column_grid(rows, columns, launch.rows, multiprocessors(x.device), launch.warps_in_flight)
    partial = torch.empty(grid.slabs, columns, dtype=torch.float32, device=x.device)
    _partial_sums_kernel[grid.programs](
        x, partial, rows, columns, grid.blocks, grid.slabs, ROWS=launch.rows, WIDTH=grid.width, num_warps=grid.warps
    )
    return finish_column_sums(partial, dtype)


@register_fake(column_sums)
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[-1], dtype=dtype)
