"""How the row-norm kernels are launched: tiles of whole rows, and the persistent grid of the backward pass.

What depends on shapes alone is worked out once for each. What is chosen here, and what else may be: `launch_choice`.
"""

import functools
from dataclasses import dataclass, replace

from neox_hf.kernels.launch_choice import LaunchChoice

TILE_ELEMENTS = 2048
"""Of the narrowest tile: 16 for each thread of four warps, two vectors of 16 bytes in half precision."""

SUMS_BYTES = 2**16
"""Partial gradients that a program keeps in registers, of which a multiprocessor has 2^18 bytes."""

WARPS_WITH_TWO_SUMS, WARPS_WITH_FOUR_SUMS = 16, 12
"""Warps whose registers a multiprocessor has: 120 a thread with one norm's partial gradients, 168 with two norms'."""

WIDEST_WITH_SUMS = 8192
"""Elements of the widest tile with 16 for each thread; more, with as many sums beside them, would leave registers."""

PIPELINE_BYTES = 200 * 2**10
"""Shared memory of a multiprocessor for rows on their way, of 227 KiB."""


@dataclass(frozen=True)
class Tile:
    """What one program holds at a time, whole rows, padded to a power of two; and the warps that share it."""

    rows: int
    block: int
    warps: int

    @classmethod
    @functools.cache
    def of(cls, width: int) -> "Tile":
        """16 elements a thread, as far as 16 warps go; 32 warps where a row is wider than 16384."""
        block = 1 << (width - 1).bit_length()
        rows = max(TILE_ELEMENTS // block, 1)
        return cls(rows, block, 32 if rows * block > 16384 else min(rows * block // 512, 16))

    @property
    def elements(self) -> int:
        return self.rows * self.block

    def covering(self, rows: int) -> int:
        """How many tiles there are in `rows`."""
        return -(-rows // self.rows)

    def fits_registers(self) -> bool:
        """Whether a warp has four to 64 elements a thread, of a program that a multiprocessor takes."""
        return 1 <= self.warps <= 32 and 4 <= self.elements // (32 * self.warps) <= 64 and self.rows >= 1


def _forward_tiles(width: int, tensors: int) -> tuple[Tile, ...]:
    """The default, then half and twice its warps, twice and half its rows. tensors: that a row is read and written of,
    in which launches of one width differ."""
    tile = Tile.of(width)
    more, fewer = 2 * tile.warps, tile.warps // 2
    others = (
        replace(tile, warps=more),
        replace(tile, warps=fewer),
        replace(tile, rows=2 * tile.rows),
        replace(tile, rows=2 * tile.rows, warps=more),
        replace(tile, rows=tile.rows // 2, warps=fewer),
    )
    return tile, *(each for each in others if each.fits_registers())


@dataclass(frozen=True)
class BackwardLaunch:
    """warps: of a program. resident: programs that run on a multiprocessor at once."""

    warps: int
    resident: int


def _backward_launches(width: int, parameters: int, element_bytes: int) -> tuple[BackwardLaunch, ...]:
    """The default, then other numbers of programs, and programs of other widths with as many warps in all."""
    tile = Tile.of(width)
    resident = max((WARPS_WITH_FOUR_SUMS if parameters > 2 else WARPS_WITH_TWO_SUMS) // tile.warps, 1)
    warps = tile.warps
    found = [BackwardLaunch(warps, count) for count in (resident, resident + 1, resident + 2, resident // 2)]
    found += [BackwardLaunch(2 * warps, max(resident // 2, 1)), BackwardLaunch(warps // 2, 2 * resident)]
    fits = [each for each in found if each.resident and replace(tile, warps=each.warps).fits_registers()]
    return tuple(dict.fromkeys(fits))


FORWARD = LaunchChoice("row_norm_forward", _forward_tiles)
BACKWARD = LaunchChoice("row_norm_backward", _backward_launches)


@dataclass(frozen=True)
class BackwardPlan:
    """programs: how many run at once. stages: tiles on their way into a program.

    in_registers: whether partial gradients of the parameters fit beside a tile; if not, another kernel reads again.
    """

    programs: int
    stages: int
    in_registers: bool

    @classmethod
    @functools.lru_cache(1024)
    def of(
        cls, width: int, rows: int, parameters: int, kind: str, element_bytes: int, processors: int, resident: int
    ) -> "BackwardPlan":
        """parameters: those that want a gradient. element_bytes: of all that is read for one element of x.
        processors: multiprocessors of the device. resident: programs of each."""
        tile = Tile.of(width)
        stages = max(min(PIPELINE_BYTES // resident // (tile.elements * element_bytes), 3), 1)
        fits = parameters * tile.elements * 4 <= SUMS_BYTES and tile.elements <= WIDEST_WITH_SUMS
        programs = min(tile.covering(rows), processors * resident)
        return cls(programs, stages, fits or kind == "scale")
