"""A flat fp32 master in DeepSpeed's hands, of which memory holds only what the bf16 weights are short of it."""

import torch
from torch import Tensor

from neox_hf.kernels.split_fp32 import join_fp32, split_fp32

AT_ONCE = 2**26
"""Elements that are taken apart or put together at a time, which takes ten bytes of each."""


class HalvedMaster:
    """master: fp32, whose tensor and DeepSpeed's views of it stay when its memory goes. weights: bf16, as many elements
    in the same order, which the master rounds to.

    remainder: int16, what the weights are short of the master; None while that is whole.
    """

    def __init__(self, master: Tensor, weights: Tensor) -> None:
        self.master, self.weights = master, weights
        self.remainder: Tensor | None = None

    @torch.no_grad()
    def halve(self) -> None:
        """Give the master's memory back, if it is there; the weights are what it rounds to from then on. The remainder
        waits in host memory for that of the master to be free."""
        if self.remainder is not None:
            return
        waiting = torch.empty_like(self.weights, dtype=torch.int16, device="cpu")
        parts = (self.master.detach(), self.weights, waiting)
        for master, weights, remainder in zip(*(part.split(AT_ONCE) for part in parts), strict=True):
            high, low = split_fp32(master)
            weights.copy_(high)
            remainder.copy_(low)
        self.master.untyped_storage().resize_(0)
        self.remainder = waiting.to(self.weights.device)

    @torch.no_grad()
    def make_whole(self) -> None:
        """Have the master in memory, to be read and written until it is halved."""
        if self.remainder is None:
            return
        self.master.untyped_storage().resize_(self.master.numel() * self.master.element_size())
        parts = (self.master.detach(), self.weights, self.remainder)
        for master, weights, remainder in zip(*(part.split(AT_ONCE) for part in parts), strict=True):
            master.copy_(join_fp32(weights, remainder))
        self.remainder = None
