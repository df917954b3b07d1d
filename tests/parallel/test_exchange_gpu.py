"""Messages by copies between two devices; or, on a host with one, between two processes that share it."""

from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist

from neox_hf.parallel.exchange import Exchange
from tests.gloo import run_ranks
from tests.parallel.two_devices import device_of, pair_in

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu]

ELEMENTS = 2**21
"""bf16, 4 MiB."""


def exchange_in(group):
    return Exchange(pair_in(group))


def summand(rank, number, device):
    random = torch.Generator(device).manual_seed(31 * number + rank)
    return torch.randn(ELEMENTS, generator=random, device=device).bfloat16()


def whole(number, device):
    return summand(0, number, device) + summand(1, number, device)


def many_at_once(rank, of_all):
    device = device_of(rank)
    link = exchange_in(None if of_all else dist.new_group([0, 1]))
    alike = []
    for number in range(0, 40, 4):
        if rank == number % 3:
            torch.cuda._sleep(10_000_000)  # one is behind
        tensors = [summand(rank, number + place, device) for place in range(4)]
        arrivals = [link.start(tensor, out=tensor) for tensor in tensors]
        for arrival in arrivals:
            arrival.wait()
        alike += [torch.equal(tensor, whole(number + place, device)) for place, tensor in enumerate(tensors)]
    return all(alike), link._pair.made


@pytest.mark.parametrize("of_all", [True, False], ids=["the world", "a group"])
def test_sums(of_all):
    assert run_ranks(many_at_once, 2, of_all, context=get_context("spawn")) == [(True, 4)] * 2


def in_a_graph(rank):
    """A graph with messages behind products, replayed with other numbers, between messages outside; a small tensor
    travels with the second."""
    device = device_of(rank)
    link = exchange_in(dist.group.WORLD)
    tensors = [summand(rank, number, device) for number in range(2)]
    small = torch.ones(5, device=device)
    matrix = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)

    def step():
        arrivals = []
        for tensor, beside in zip(tensors, (None, small), strict=True):
            arrivals.append(link.start(tensor, out=tensor, beside=beside))
            matrix @ matrix
        for arrival in arrivals:
            arrival.wait()

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    alike = []
    for turn in range(1, 30):
        for number, tensor in enumerate(tensors):
            tensor.copy_(summand(rank, 2 * turn + number, device))
        small.fill_(turn + rank)
        if turn % 2 == rank:
            torch.cuda._sleep(5_000_000)
        graph.replay()
        alike += [torch.equal(tensor, whole(2 * turn + number, device)) for number, tensor in enumerate(tensors)]
        alike.append(bool((small == 2 * turn + 1).all()))
        if turn % 5 == 0:
            outside = summand(rank, 1000 + turn, device)
            link.start(outside, out=outside).wait()
            alike.append(torch.equal(outside, whole(1000 + turn, device)))
    return all(alike), link._pair.made


def test_in_a_graph():
    assert run_ranks(in_a_graph, 2, context=get_context("spawn")) == [(True, 2)] * 2
