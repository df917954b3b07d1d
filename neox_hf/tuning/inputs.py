"""Random inputs of an op, the same for every candidate."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Random:
    """Random tensors on one device; equal seeds give equal numbers."""

    device: torch.device
    seed: int = 0
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator(self.device).manual_seed(self.seed)

    def values(self, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.empty(shape, device=self.device, dtype=dtype)
        return values.normal_(std=scale, generator=self._generator)

    def words(self, count: int, vocabulary: int) -> Tensor:
        return torch.randint(vocabulary, (count,), device=self.device, generator=self._generator)
