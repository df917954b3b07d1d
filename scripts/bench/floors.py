"""What an op cannot be quicker than: every byte moved once, every product at the rate that the card sustains.

Rates are those of an H200 at 700 W (torch 2.11, cuBLAS 13.1): they make floors comparable between runs. What this
device did in this run is measured beside, by `ceilings`.
"""

from dataclasses import dataclass

COPY = 4285e9
"""Bytes/s, read and written, of a copy of 4 GiB."""

PRODUCTS = 675e12
"""FLOP/s of bf16 matrix products under load: the card is limited by power. A burst of ten reaches 775."""

HEAD_PRODUCTS = 710e12
"""FLOP/s of the head's three products, the best of all shapes."""

FP8_PRODUCTS = 1322e12
"""FLOP/s of eight-bit products 8192^3, one scale a tensor."""


@dataclass(frozen=True)
class Work:
    """What one call has to do: bytes to move and FLOPs in matrix products, whichever takes longer."""

    moved: float = 0.0
    flops: float = 0.0
    rate: float = PRODUCTS

    @property
    def floor_ms(self) -> float:
        return 1e3 * max(self.moved / COPY, self.flops / self.rate)


@dataclass(frozen=True)
class Shapes:
    """One layer's sizes; by default those of Pythia-1.4B at micro-batch 8. rotary: rotated width of a head."""

    batch: int = 8
    sequence: int = 2048
    heads: int = 16
    head_size: int = 128
    inner: int = 8192
    vocabulary: int = 50304
    rotary: int = 32

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def hidden(self) -> int:
        return self.heads * self.head_size

    @property
    def stream(self) -> int:
        """Bytes of a tensor [tokens, hidden] in bf16."""
        return 2 * self.tokens * self.hidden

    @property
    def wide(self) -> int:
        """Bytes of a tensor [tokens, inner] in bf16."""
        return 2 * self.tokens * self.inner

    @property
    def logits(self) -> int:
        """Bytes of a tensor [tokens, vocabulary] in bf16."""
        return 2 * self.tokens * self.vocabulary

    @property
    def rotated(self) -> int:
        """Bytes read and written where the rotated part of query and key is turned in place, in bf16."""
        return 2 * 2 * self.tokens * self.heads * self.rotary * 2
