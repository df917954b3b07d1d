"""Which part of a whole tensor a rank's parameter is.

A tensor is split along one dimension. What lies beyond its end is padding: rows of the vocabulary that exist in memory
only, so that every rank's share has the same size. Padding is never written, read or trained.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Shard:
    """A contiguous slice along `dim` of a tensor of `shape`, the shape on disk. It begins at `start`; `length` of its
    elements along `dim` are real, the rest of the parameter is padding (`length` may be 0)."""

    dim: int
    start: int
    length: int
    shape: tuple[int, ...]

    @classmethod
    def of_rank(cls, dim: int, shape: tuple[int, ...], rank: int, size: int, padded: int | None = None) -> "Shard":
        """The share of `rank` among `size`, of `padded` elements along `dim` (those of the shape, if not given)."""
        share, rest = divmod(padded or shape[dim], size)
        assert rest == 0, f"{shape} cannot be split into {size} along {dim}"
        start = rank * share
        return cls(dim, start, max(0, min(share, shape[dim] - start)), tuple(shape))

    @property
    def offsets(self) -> tuple[int, ...]:
        """Corner of this share in the whole tensor."""
        return tuple(min(self.start, self.shape[d]) if d == self.dim else 0 for d in range(len(self.shape)))

    def real(self, local: Tensor) -> Tensor:
        """The part of a tensor of this rank's size that is no padding: a view."""
        return local.narrow(self.dim, 0, self.length)

    def padding(self, local: Tensor) -> Tensor:
        """The part of a tensor of this rank's size that is nothing but padding: a view."""
        return local.narrow(self.dim, self.length, local.shape[self.dim] - self.length)

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's real part of a whole tensor: a view."""
        return whole.narrow(self.dim, self.offsets[self.dim], self.length)


class Sharded:
    """A module that holds shards: mixed into the parallel layers, beside the class whose parameters they split."""

    def shards(self) -> dict[str, Shard]:
        """The shard of each own parameter that is not whole, by its name in this module."""
        raise NotImplementedError


def shards_of(model: nn.Module) -> dict[nn.Parameter, Shard]:
    """The shard of every parameter that is not whole on this rank. A tied parameter has one."""
    return dict(_walk(model))


def _walk(model: nn.Module) -> Iterator[tuple[nn.Parameter, Shard]]:
    for module in model.modules():
        if isinstance(module, Sharded):
            for name, shard in module.shards().items():
                parameter = getattr(module, name)
                if parameter is not None:
                    yield parameter, shard
