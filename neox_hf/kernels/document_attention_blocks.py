"""What the passes of document attention share: how blocks of tokens are read, what is seen in them, and launches.

Shapes and names as in `document_attention.py`.
"""

from collections.abc import Callable, Iterable
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
def first_and_behind(first, behind, row, begin, sequence, KEYS: tl.constexpr):
    """Of a block of queries, row by row the span of keys; and where, in blocks of KEYS, one query and all begin to see
    keys, where not all do any more, and where none does."""
    inside = row < sequence
    own_first = tl.load(first + row, mask=inside, other=0)
    own_behind = tl.load(behind + row, mask=inside, other=0)
    some_see = tl.load(first + begin) // KEYS * KEYS
    not_all_see = tl.load(behind + begin) // KEYS * KEYS
    all_see = tl.minimum(tl.cdiv(tl.max(own_first, axis=0), KEYS) * KEYS, not_all_see)
    return own_first, own_behind, some_see, all_see, not_all_see, tl.max(own_behind, axis=0)


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

    def fitting(
        self, launches: Iterable[BlockLaunch], rows: Callable[[BlockLaunch], tuple[int, int]]
    ) -> tuple[BlockLaunch, ...]:
        """Those whose blocks fit into shared memory, with as many loaded ahead as do. rows: of [width] that a program
        holds, and that it loads at a time."""
        found: dict[BlockLaunch, None] = {}
        for launch in launches:
            held, loaded = (count * self.width * self.element_size for count in rows(launch))
            stages = (1024 * (self.kilobytes - SPARE_KILOBYTES) - held) // loaded
            if stages > 0:
                found[replace(launch, stages=min(launch.stages, stages))] = None
        return tuple(found) or (SMALLEST,)


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
