"""Averages over two or more replicas, under way while the backward pass goes on.

Replicas on two devices that can copy into each other's memory do (`exchange.py`): beside the backward pass's products
NCCL hides next to nothing.
"""

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from neox_hf.parallel.exchange import Arrival, Exchange

COPIES_UNDER_WAY = 3
"""At most: each has memory of its own on the other device until it is added."""


class Averages:
    """Tensors that become their averages over `group`, in place; of `finish`, on the current stream.

    group: None is the whole world. exchange: of this group, if it is two devices that may copy. part: elements of a
    copy, at most, so that all take little memory.
    """

    def __init__(self, group: dist.ProcessGroup | None, exchange: Exchange | None, part: int) -> None:
        self._group, self._exchange, self._part = group, exchange, part
        # NCCL divides as it reads; elsewhere that is a pass of its own.
        self._divides = dist.get_backend(group) == "nccl"
        self._arrivals: deque[tuple[Arrival, Tensor]] = deque()
        self._works: list[dist.Work] = []

    def start(self, tensor: Tensor) -> None:
        """Have `tensor`, contiguous, averaged. Every rank starts the same ones, in one order."""
        if self._exchange is None or not self._exchange.copies:
            self._start_backend(tensor)
            return
        for part in tensor.flatten().split(self._part):
            if len(self._arrivals) == COPIES_UNDER_WAY:
                self._take_first()
            arrival = self._exchange.start(part)
            if arrival is None:
                self._start_backend(part)
            else:
                self._arrivals.append((arrival, part))

    def finish(self) -> None:
        """What has been started is there."""
        while self._arrivals:
            self._take_first()
        for work in self._works:
            work.wait()
        self._works.clear()

    def _start_backend(self, tensor: Tensor) -> None:
        if not self._divides:
            tensor.div_(dist.get_world_size(self._group))
        operation = dist.ReduceOp.AVG if self._divides else dist.ReduceOp.SUM
        self._works.append(dist.all_reduce(tensor, operation, group=self._group, async_op=True))

    def _take_first(self) -> None:
        arrival, part = self._arrivals.popleft()
        arrival.hand_to(lambda first, second: torch.lerp(first, second, 0.5, out=part))
