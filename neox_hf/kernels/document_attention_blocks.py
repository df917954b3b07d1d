"""What the passes of document attention share: how blocks of tokens are read, what is seen in them, and launches.

Shapes and names as in `document_attention.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from neox_hf.kernels.devices import shared_kilobytes
from neox_hf.kernels.language import interprets, tl, triton

LOG2_E = 1.4426950408889634
"""Powers are of 2: kernels are given the scale of scores times this."""


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """Summed in fp32. The interpreter cannot multiply bf16, and is given fp32."""
    if PRECISION == "ieee":
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_rows(x, token, stride, sequence, SIZE: tl.constexpr, WIDTH: tl.constexpr, BOUNDED: tl.constexpr):
    """[tokens, WIDTH] of one head. BOUNDED: tokens may lie beyond the sequence, where they are zeros."""
    column = tl.arange(0, WIDTH)
    place = x + token[:, None].to(tl.int64) * stride + column[None, :]
    if BOUNDED:
        return tl.load(place, mask=(token < sequence)[:, None] & (column < SIZE)[None, :], other=0.0)
    if SIZE != WIDTH:
        return tl.load(place, mask=(column < SIZE)[None, :], other=0.0)
    return tl.load(place)


@triton.jit
def store_rows(x, token, stride, sequence, rows, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    place = x + token[:, None].to(tl.int64) * stride + column[None, :]
    tl.store(place, rows.to(x.dtype.element_ty), mask=(token < sequence)[:, None] & (column < SIZE)[None, :])


@triton.jit
def spans_of_queries(first, behind, row, begin, sequence, KEYS: tl.constexpr):
    """Of a block of queries: each one's span of keys; and, in blocks of KEYS, the places from which some of them see
    keys, from which all do, from which not all do any more, and from which none does."""
    inside = row < sequence
    own_first = tl.load(first + row, mask=inside, other=0)
    own_behind = tl.load(behind + row, mask=inside, other=0)
    some_see = tl.load(first + begin) // KEYS * KEYS
    not_all_see = tl.load(behind + begin) // KEYS * KEYS
    all_see = tl.minimum(tl.cdiv(tl.max(own_first, axis=0), KEYS) * KEYS, not_all_see)
    return own_first, own_behind, some_see, all_see, not_all_see, tl.max(own_behind, axis=0)


@triton.jit
def part_between(PART: tl.constexpr, first, second, third, fourth):
    """From where to where the first, the second or the third part goes."""
    if PART == 0:
        low, high = first, second
    elif PART == 1:
        low, high = second, third
    else:
        low, high = third, fourth
    return low, high


@triton.jit
def load_kept(kept, batch, key, sequence):
    """Whether keys may be seen at all; 1 where nothing says otherwise."""
    if kept is None:
        keep = tl.full(key.shape, 1, tl.int1)
    else:
        keep = tl.load(kept + batch * sequence + key, mask=key < sequence, other=0) != 0
    return keep


@dataclass(frozen=True)
class BlockLaunch:
    """Queries and keys of a block, warps that share it, and blocks that are loaded ahead. Where a program holds keys,
    their number is a multiple of the queries'."""

    queries: int
    keys: int
    warps: int
    stages: int


SMALLEST = BlockLaunch(16, 16, 4, 1)
SPARE_KILOBYTES = 2
"""For a block's numbers of rows."""


class BlockShape(NamedTuple):
    """What launches depend on: the head size, rounded up to a power of two, the bytes of an element, and the KiB of
    shared memory that a program may have."""

    width: int
    element_size: int
    kilobytes: int

    @classmethod
    def of(cls, query: Tensor) -> "BlockShape":
        width = max(16, 1 << (query.shape[-1] - 1).bit_length())
        return cls(width, query.element_size(), shared_kilobytes(query.device))

    @property
    def kind(self) -> tuple[int, int]:
        """By which candidates are listed: bytes of an element, and the width up to which they are meant."""
        return self.element_size, 64 if self.width <= 64 else 128 if self.width <= 128 else 256


Candidates = Mapping[tuple[int, int], tuple[BlockLaunch, ...]]


def fitting(
    candidates: Candidates, rows: Callable[[BlockLaunch], tuple[int, int]]
) -> Callable[..., tuple[BlockLaunch, ...]]:
    """The candidates of a `BlockShape` whose rows fit into shared memory, with as many loaded ahead as do.

    What a compiler wants besides is not counted: the defaults have it on devices with 99 KiB, of others the tuner finds
    out. rows: of [width] that a program holds, and that it loads at a time.
    """

    def launches(*shape: int) -> tuple[BlockLaunch, ...]:
        of_blocks, found = BlockShape(*shape), dict.fromkeys(())
        for launch in candidates[of_blocks.kind]:
            held, loaded = (count * of_blocks.width * of_blocks.element_size for count in rows(launch))
            stages = (1024 * (of_blocks.kilobytes - SPARE_KILOBYTES) - held) // loaded
            if stages > 0:
                found[replace(launch, stages=min(launch.stages, stages))] = None
        return tuple(found) or (SMALLEST,)

    return launches


def leading_strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of batch, heads and tokens, of one tensor after the other."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def block_constants(query: Tensor, launch: BlockLaunch) -> dict[str, int | str]:
    shape = BlockShape.of(query)
    return {
        "SIZE": query.shape[-1],
        "WIDTH": shape.width,
        "QUERIES": launch.queries,
        "KEYS": launch.keys,
        # fp32 by three products of TF32 each, which are as near: one by one it would not fit into registers.
        "PRECISION": "ieee" if interprets() else "tf32x3" if shape.element_size == 4 else "tf32",
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }
