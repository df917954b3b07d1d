"""What two stages send each other by copies, gloo standing for these: it comes in order, when there is room for it."""

import torch
import torch.distributed as dist

from neox_hf.parallel import topology
from neox_hf.parallel.neighbour import Neighbour
from tests.gloo import run_ranks
from tests.parallel.gloo_copies import Place, pair_of

CPU = torch.device("cpu")


def message(number: int) -> list[torch.Tensor]:
    return [torch.full((2, 3), float(number)).bfloat16(), torch.tensor([number, -number])]


def in_order(rank: int) -> list[bool]:
    """Three messages down, two up; what is sent may be overwritten at once."""
    link = Neighbour(pair_of())
    link.make_room(512, CPU)
    found = []

    def send(number: int) -> None:
        tensors = message(number)
        link.send(tensors)
        for tensor in tensors:
            tensor.zero_()

    def receive(number: int) -> None:
        came = link.receive(message(0))
        found.extend(torch.equal(a, b) for a, b in zip(came, message(number), strict=True))

    numbers, others = ([1, 2, 3], [11, 12]) if rank == 0 else ([11, 12], [1, 2, 3])
    for number in numbers:
        send(number)
    for number in others:
        receive(number)
    return found


def test_messages_come_in_order_both_ways():
    assert run_ranks(in_order, 2) == [[True] * 4, [True] * 6]


def what_has_room(rank: int) -> list[bool]:
    link = Neighbour(pair_of())
    found = [link.has_room, link.carries(message(1))]
    for size in (256, 512, 256, 512):  # each tensor begins at a multiple of 256 bytes
        link.make_room(size, CPU)
        found.append(link.carries(message(1)))
    return [*found, link.carries([torch.empty(0)]), len(Place.made)]


def test_messages_for_which_there_is_no_room_are_not_carried():
    assert run_ranks(what_has_room, 2) == [[False, False, False, True, True, True, False, 2]] * 2


def with_a_stranger(rank: int) -> list[bool]:
    link = Neighbour(pair_of(near=lambda group, device: rank == 0))
    for size in (256, 512):
        link.make_room(size, CPU)
    return [link.has_room, link.carries(message(1)), len(Place.made)]


def test_devices_that_do_not_reach_each_other_carry_nothing():
    assert run_ranks(with_a_stranger, 2) == [[False, False, 0]] * 2


def in_a_chain(rank: int) -> list[int]:
    """Three ranks; the middle one has two neighbours."""
    groups = [dist.new_group([first, first + 1]) for first in range(2)]
    links = [Neighbour(pair_of(group)) if rank in (first, first + 1) else None for first, group in enumerate(groups)]
    for link in links:
        if link is not None:
            link.make_room(512, CPU)
    if rank == 0:
        links[0].send(message(5))
        return []
    came = links[rank - 1].receive(message(0))
    if rank == 1:
        links[1].send(came)
    return came[1].tolist()


def test_stages_in_a_chain():
    assert run_ranks(in_a_chain, 3) == [[], [5, -5], [5, -5]]


def whose_neighbours(rank: int) -> tuple[int | None, int | None]:
    """Ranks of the stages before and behind, as they say themselves."""
    topology.Pair, topology.Topology._may_copy = pair_of, lambda self: True
    groups = topology.Topology.from_world(6, rank, pipeline=3, tensor=2).connect().groups
    mine = [torch.tensor([rank])]
    links = [link for link in (groups.previous, groups.next) if link is not None]
    for link in links if rank // 2 % 2 else reversed(links):
        link.make_room(256, CPU)
        link.send(mine)
    return tuple(link and link.receive(mine)[0].item() for link in (groups.previous, groups.next))


def test_neighbours_are_the_same_tensor_rank_of_the_stages_beside():
    assert run_ranks(whose_neighbours, 6) == [(None, 2), (None, 3), (0, 4), (1, 5), (2, None), (3, None)]
