"""What stands for two devices that copy into each other's memory: two gloo ranks."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import ClassVar

import torch
import torch.distributed as dist

from neox_hf.parallel.exchange import BESIDE_BYTES, Exchange
from neox_hf.parallel.pair import Pair
from neox_hf.parallel.peer_memory import bytes_of


class Place:
    """Room for what the other rank sends, through gloo; `made` of them. One is `in_use` once. What is sent waits, as on
    a device, until what was sent before has been released; there it is a stream that waits."""

    made: ClassVar[list["Place"]] = []

    def __init__(self, size, device):
        self.size, self.received, self.in_use, self.under_way = size, None, False, []
        Place.made.append(self)

    def meet(self, group, number, patience):
        self.number, self.group, self.sent = number, group, 0
        self.other = dist.get_global_rank(group, 1 - dist.get_rank(group))

    def exchange(self, *tensors):
        assert not self.in_use
        room, first, *rest = self.size - BESIDE_BYTES, *(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert room / 2 < first <= room
        assert sum(rest) <= BESIDE_BYTES
        self.send(*tensors)
        self.in_use = True

    def send(self, *tensors):
        assert bytes_of(tensors) <= self.size
        if self.sent:
            dist.recv(torch.empty(1), self.other, self.group, tag=2 * self.number + 1)
        self.sent += 1
        for tensor in tensors:
            self._start(tensor.clone(), 2 * self.number)

    def expect(self):
        assert not self.in_use
        self.in_use = True

    def came(self, *like):
        assert self.in_use
        if self.received is None:
            self.received = [torch.empty_like(tensor) for tensor in like]
            for tensor in self.received:
                dist.recv(tensor, self.other, self.group, tag=2 * self.number)
        return self.received

    def summands(self, *tensors):
        pairs = zip(tensors, self.came(*tensors), strict=True)
        return [pair[:: 1 if dist.get_rank(self.group) == 0 else -1] for pair in pairs]

    def release(self):
        self.in_use, self.received = False, None
        self._start(torch.ones(1), 2 * self.number + 1)

    def _start(self, tensor, tag):
        self.under_way.append((dist.isend(tensor, self.other, self.group, tag=tag), tensor))


class Lane:
    def behind_current(self):
        return nullcontext()

    def mark(self):
        return SimpleNamespace(wait=lambda: None)


def pair_of(group=None, make_place=Place, near=lambda group, device: True, **given):
    return Pair(group, make_place, Lane, near, **given)


def exchange_of(group=None, make_place=Place, near=lambda group, device: True):
    Place.made.clear()
    return Exchange(pair_of(group, make_place, near))
