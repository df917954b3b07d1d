"""Stateless pseudo-randomness: every choice of the data order is a function of a few integers.

The mixer is the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014). Everything is integer arithmetic, so
the order is the same on every machine and in every version of every library.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

WORD = 1 << 64
_MASK = WORD - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio
_ROOT = 0x6A09E667F3BCC908  # 2**64 times what the square root of 2 is above 1

# What a hash is for; two uses never share their numbers.
ORDER, HELD_OUT = 1, 2


def mix(*values: int) -> int:
    """A 64-bit hash of some integers; their order matters."""
    state = 0
    for value in values:
        state = (state + value + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def permuted(index: int, size: int, *key: int) -> int:
    """Where `index` of range(size) goes in the permutation named by `key`. No table: constant memory for any size.

    A balanced Feistel network permutes the next power of four; indices that leave range(size) are sent through again.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & half_mask
        for turn in range(4):
            left, right = right, left ^ (mix(ORDER, turn, right, *key) & half_mask)
        index = left << half_bits | right
        if index < size:
            return index


def is_held_out(fraction: float, *key: int) -> bool:
    """Whether the document named by `key` belongs to the held-out `fraction`. A larger fraction only adds documents."""
    return mix(HELD_OUT, *key) < fraction * WORD


class WeightedChoice:
    """Which of several sources sample j comes from, where sample j is of stream j mod `streams`.

    A low-discrepancy sequence against the cumulative weights: after any number of samples each source has its share to
    within a few samples, in the whole and in each stream. So it advances by the golden ratio from one sample of a
    stream to its next, and by another irrational number from stream to stream: by one number alone, a stream would come
    back to the same source again and again wherever `streams` times that number is nearly whole.
    """

    def __init__(self, weights: Sequence[float], streams: int) -> None:
        total = sum(weights)
        self._bounds = [int(bound / total * WORD) for bound in accumulate(weights)][:-1]
        self._streams = streams

    def __call__(self, sample: int) -> int:
        turn, stream = divmod(sample, self._streams)
        return bisect_right(self._bounds, turn * _GOLDEN + stream * _ROOT & _MASK)
