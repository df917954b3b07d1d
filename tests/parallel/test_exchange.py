"""Messages of two ranks by copies: what they sum, whose memory they take, and when they leave it to the backend.

On this host gloo stands for the copies; `test_exchange_gpu.py` has the real ones.
"""

import dataclasses

import pytest
import torch

from neox_hf import GPTNeoXConfig, GPTNeoXLayer
from neox_hf.parallel import Topology, exchange, topology
from neox_hf.parallel.exchange import BESIDE_BYTES, LEAST_BYTES
from neox_hf.parallel.messages import start_all_reduce, start_sum
from tests.gloo import run_ranks
from tests.parallel.gloo_copies import Place, exchange_of
from tests.parallel.regions import region_of

ELEMENTS = LEAST_BYTES // 4
"""In fp32, of the smallest message that is copied."""


def summand(rank, elements, number):
    return torch.randn(elements, generator=torch.Generator().manual_seed(17 * number + rank))


def whole(elements, number):
    return summand(0, elements, number) + summand(1, elements, number)


def sums_of_many(rank):
    """Up to three under way at once, of two sizes and some that have room in the larger, through the world's group."""
    link, under_way = exchange_of(), []
    for number in range(12):
        elements = ELEMENTS * (1 + number % 2) - number % 4 // 3
        tensor = summand(rank, elements, number)
        under_way.append((link.start(tensor, tensor), tensor, elements, number))
        if len(under_way) == 3:
            arrival, tensor, elements, number = under_way.pop(0)
            arrival.wait()
            assert torch.equal(tensor, whole(elements, number))
    for arrival, tensor, elements, number in under_way:
        arrival.wait()
        assert torch.equal(tensor, whole(elements, number))
    return sorted((place.size, place.number) for place in Place.made)


def test_sums_and_what_memory_they_take():
    """As many places of a size as were under way at once, each with its number."""
    first, second = run_ranks(sums_of_many, 2)
    assert first == second
    assert [(size - BESIDE_BYTES) // LEAST_BYTES for size, _ in first] == [1, 1, 2, 2]
    assert sorted(number for _, number in first) == [0, 1, 2, 3]


def what_is_left(rank):
    link = exchange_of()
    small = link.start(torch.ones(ELEMENTS - 1))
    exchange.is_capturing = lambda: True
    unknown = link.start(torch.ones(ELEMENTS))
    exchange.is_capturing = lambda: False
    tensor = torch.ones(ELEMENTS)
    link.start(tensor, out=tensor).wait()
    exchange.is_capturing = lambda: True
    known = link.start(tensor)
    second = link.start(torch.ones(ELEMENTS))
    total = known.wait()
    return small, unknown, second, tensor[0].item(), total[0].item(), len(Place.made)


def test_what_is_left_to_the_backend():
    """Small messages, and in a graph whatever has no memory yet: none is got while one is captured."""
    assert run_ranks(what_is_left, 2) == [(None, None, None, 2.0, 4.0, 1)] * 2


def with_a_stranger(rank):
    def make_place(*args):
        if rank == 1:
            raise RuntimeError("no peer access")
        return Place(*args)

    region = dataclasses.replace(region_of(rank), exchange=exchange_of(make_place=make_place))
    tensors = [summand(rank, ELEMENTS, number) for number in range(2)]
    for tensor in tensors:
        start_all_reduce(tensor, region).wait()
    sums = [torch.equal(tensor, whole(ELEMENTS, number)) for number, tensor in enumerate(tensors)]
    return sums, region.exchange.copies, len(Place.made)


def test_devices_that_do_not_reach_each_other_go_through_the_backend():
    """Both of them, though one got its memory; nobody tries again."""
    assert run_ranks(with_a_stranger, 2) == [([True, True], False, 1), ([True, True], False, 0)]


def who_hands_over_what(rank):
    """Summands go to whoever adds them to more, in one order on both ranks."""
    link, tensor, seen = exchange_of(), summand(rank, ELEMENTS, 0), []
    link.start(tensor).hand_to(lambda first, second: seen.extend([first.clone(), second.clone()]))
    return [torch.equal(found, summand(place, ELEMENTS, 0)) for place, found in enumerate(seen)]


def test_summands_come_in_the_order_of_the_ranks():
    assert run_ranks(who_hands_over_what, 2) == [[True, True]] * 2


def beside_another(rank):
    """A small tensor of another dtype in the message of a large one, twice, and one that is too large to."""
    link, sums = exchange_of(), []
    for number in range(2):
        tensor, small = summand(rank, ELEMENTS, number), summand(rank, 7, 5 + number).double()
        total = link.start(tensor, beside=small).wait()
        sums += [torch.equal(total, whole(ELEMENTS, number)), torch.equal(tensor, summand(rank, ELEMENTS, number))]
        sums.append(torch.equal(small, summand(0, 7, 5 + number).double() + summand(1, 7, 5 + number).double()))
    assert link.start(tensor, beside=torch.ones(BESIDE_BYTES // 4 + 1)) is None
    return sums, len(Place.made)


def test_a_small_tensor_travels_with_a_large_one():
    assert run_ranks(beside_another, 2) == [([True] * 6, 1)] * 2


def beside_by_backend(rank):
    region, tensor, small = region_of(rank), summand(rank, 3, 0), summand(rank, 3, 1)
    total = start_sum(tensor, region, beside=small).wait()
    return [torch.equal(total, whole(3, 0)), torch.equal(tensor, summand(rank, 3, 0)), torch.equal(small, whole(3, 1))]


def test_the_backend_sums_both():
    assert run_ranks(beside_by_backend, 2) == [[True] * 3] * 2


def far_for_one(rank):
    link = exchange_of(near=lambda group, device: rank == 0)
    return link.start(torch.ones(ELEMENTS)), link.copies, len(Place.made)


def test_devices_that_one_rank_finds_far_go_through_the_backend():
    assert run_ranks(far_for_one, 2) == [(None, False, 0)] * 2


def gradients_of_a_layer(rank):
    """The same layer with messages by copies and by gloo: gradients, which differ by rounding."""
    config = GPTNeoXConfig(
        vocab_size=32, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=256,
        attn_implementation="eager",
    )  # fmt: skip
    found = []
    for link in (None, exchange_of()):
        torch.manual_seed(rank)
        layer = GPTNeoXLayer(config, 0, dataclasses.replace(region_of(rank), exchange=link)).train()
        x = torch.randn(4, 1024, 64, generator=torch.Generator().manual_seed(5)).requires_grad_()
        angles = torch.zeros(1, 1024, 4)
        layer(x, position_embeddings=(angles.cos(), angles.sin()))[0].square().mean().backward()
        found.append([x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    return len(Place.made), [
        torch.allclose(a, b, rtol=1e-5, atol=1e-6 * b.abs().max()) for a, b in zip(*found, strict=True)
    ]


def test_a_layer_is_the_same():
    for made, alike in run_ranks(gradients_of_a_layer, 2):
        assert made > 0
        assert all(alike)


@pytest.mark.parametrize(
    ("world", "tensor", "pipeline", "backend", "asked", "copies"),
    [
        (2, 2, 1, "nccl", True, "exchange"),
        (2, 2, 1, "cuda:nccl,cpu:gloo", True, "exchange"),
        (2, 2, 1, "nccl", False, ""),
        (2, 2, 1, "gloo", True, ""),
        (4, 4, 1, "nccl", True, ""),
        (1, 1, 1, None, True, ""),
        (2, 1, 1, None, True, ""),
        (2, 1, 2, "nccl", True, "next"),
        (4, 1, 2, "cuda:nccl,cpu:gloo", True, "next"),
        (4, 2, 2, "nccl", True, "exchange next"),
        (2, 1, 2, "nccl", False, ""),
        (2, 1, 2, "gloo", True, ""),
    ],
)
def test_devices_that_may_copy_do(world, tensor, pipeline, backend, asked, copies, monkeypatch):
    """Where they may not, none is asked for its backend: there may be no process group."""
    if backend is not None:
        monkeypatch.setattr(topology.dist, "get_backend", lambda group=None: backend)
    monkeypatch.setattr(topology.dist, "new_subgroups_by_enumeration", lambda ranks: (None, None))
    groups = Topology.from_world(world, 0, tensor=tensor, pipeline=pipeline, copies=asked).connect().groups
    assert [name for name in ("exchange", "previous", "next") if getattr(groups, name)] == copies.split()
