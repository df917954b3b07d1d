"""How the rotary kernels are launched: tiles of tokens and heads, persistent grids of those that sum, and angles."""

import functools
from dataclasses import dataclass

from torch import Tensor

from neox_hf.kernels.language import triton
from neox_hf.kernels.launch_choice import LaunchChoice, for_every_shape

TILE_ELEMENTS = 2048
"""Of each tensor that a program reads: in bf16 one 16-byte load for a thread of eight warps, two of four."""

PROGRAMS_WITH_SUMS = 2
"""Programs for each multiprocessor where they hold sums, which few of them do best: what keeps the memory busy are the
blocks that each has under way."""

BYTES_UNDER_WAY = 8
"""Of each element that such a program reads, in shared memory: four blocks of half precision are asked for at once, in
72 KB. On an H200 0.117 ms instead of 0.251 with one (16 heads of 128, 16,384 tokens), 0.164 instead of 0.240 (12 heads
of 64, 65,536 tokens)."""


MOST_WARPS = 32
"""Of one program."""


@dataclass(frozen=True)
class InPlaceLaunch:
    """tokens: whole ones, of a program. rows: query and key heads for each of its warps."""

    tokens: int
    rows: int


@dataclass(frozen=True)
class AssembleLaunch:
    """elements: of a tile. warps: of the program that has it."""

    elements: int
    warps: int


@dataclass(frozen=True)
class SummingLaunch:
    """elements, warps: as of `AssembleLaunch`. programs: for each multiprocessor. under_way: tiles that each asks for
    at once."""

    elements: int
    warps: int
    programs: int
    under_way: int


def _back_launches(heads: int, size: int, half: int, element_size: int) -> tuple[SummingLaunch, ...]:
    """On an H200, with 16 heads of 128 and 16,384 tokens: 0.070 ms, and 0.072 with the second; the other way round
    0.151 and 0.128 with 12 heads of 64 and 65,536 tokens."""
    small, large = SummingLaunch(TILE_ELEMENTS, 4, 4, 4), SummingLaunch(2 * TILE_ELEMENTS, 4, 4, 3)
    others = SummingLaunch(2 * TILE_ELEMENTS, 4, 3, 4), SummingLaunch(2 * TILE_ELEMENTS, 8, 2, 4)
    return (small, large, *others) if size > 64 else (large, small, *others)


def _summing_launches(heads: int, size: int, half: int, element_size: int) -> tuple[SummingLaunch, ...]:
    """The default, then other programs with about as much of the shared memory."""
    tiles, programs = BYTES_UNDER_WAY // element_size, PROGRAMS_WITH_SUMS
    return (
        SummingLaunch(TILE_ELEMENTS, 8, programs, tiles),
        SummingLaunch(TILE_ELEMENTS, 4, programs, tiles),
        SummingLaunch(TILE_ELEMENTS, 8, 2 * programs, tiles // 2),
        SummingLaunch(TILE_ELEMENTS, 4, 2 * programs, tiles // 2),
        SummingLaunch(TILE_ELEMENTS // 2, 4, 2 * programs, tiles),
        SummingLaunch(TILE_ELEMENTS, 8, programs, tiles + tiles // 2),
    )


# Shapes: heads, their size, half of the width that is rotated; with sums, bytes of an element besides.
# In place, many threads with little each: the fewer tokens are under way at once, the better memory takes the short
# pieces that are written. On an H200, 16 heads of 128 and 16,384 tokens: 0.0295 ms, and 0.0324 with half the warps.
IN_PLACE = LaunchChoice(
    "rotary_in_place",
    for_every_shape(InPlaceLaunch(1, 4), InPlaceLaunch(2, 4), InPlaceLaunch(1, 8), InPlaceLaunch(2, 8)),
)
ASSEMBLE = LaunchChoice(
    "rotary_assemble",
    for_every_shape(
        AssembleLaunch(TILE_ELEMENTS, 4), AssembleLaunch(TILE_ELEMENTS, 8), AssembleLaunch(TILE_ELEMENTS // 2, 4)
    ),
)
ASSEMBLE_WITH_SUMS = LaunchChoice("rotary_assemble_with_sums", _summing_launches)
BACK_WITH_SUMS = LaunchChoice("rotary_back_with_sums", _back_launches)


def without_gaps(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, int]:
    """cos and sin as kernels read them, and how many elements lie between two batches: 0 where they share angles."""
    cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, cos.shape[1] * cos.shape[2] if cos.shape[0] > 1 else 0


@functools.cache
def tile_in_place(launch: InPlaceLaunch, half: int, rows: int) -> tuple[int, int, int, int]:
    """Tokens, rows of a token and columns of each half in one program, and its warps.

    Every thread has an element: of two with the same one, the first could store it before the other loads it.
    """
    columns, in_token = triton.next_power_of_2(half), triton.next_power_of_2(rows)
    tokens = max(launch.tokens, 32 // (in_token * columns))
    in_token = min(in_token, MOST_WARPS * launch.rows // tokens)
    warps = min(tokens * in_token // launch.rows, tokens * in_token * columns // 32)
    return tokens, in_token, columns, max(warps, 1)


@functools.cache
def tile(width: int, rows: int, elements: int = TILE_ELEMENTS) -> tuple[int, int, int]:
    """Tokens, rows of a token and columns in one program: about so many elements of each tensor it reads; whole rows,
    all of a token if they fit, then more tokens."""
    columns = triton.next_power_of_2(width)
    in_token = min(triton.next_power_of_2(rows), max(elements // columns, 1))
    return max(elements // (columns * in_token), 1), in_token, columns
