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
    """Three messages down, one ahead, and two up; what is sent may be overwritten at once."""
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

    turns = [(send, 1), (send, 2), (receive, 11), (send, 3), (receive, 12)]
    answers = [(receive, 1), (send, 11), (receive, 2), (send, 12), (receive, 3)]
    for act, number in answers if rank else turns:
        act(number)
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


def with_little_memory(rank: int, refusals: list[int]) -> list[bool]:
    """Of the places that the second rank reserves those of `refusals` are refused, each attempt counted."""
    attempts = []

    def make_place(size: int, device: torch.device) -> Place:
        attempts.append(size)
        if rank == 1 and len(attempts) - 1 in refusals:
            raise RuntimeError("out of memory")
        return Place(size, device)

    link = Neighbour(pair_of(make_place=make_place))
    found = []
    for size in (512, 2048, 4096):
        link.make_room(size, CPU)
        found.append([link.carries(message(1)), link.carries([torch.empty(size)[: size // 4]])])
    return found


def test_memory_that_is_refused_once_is_asked_for_again():
    """When torch has given back what it keeps."""
    assert run_ranks(with_little_memory, 2, [0, 2]) == [[[True, True]] * 3] * 2


def test_a_place_that_one_rank_is_refused_neither_has_and_both_keep_what_they_had():
    assert run_ranks(with_little_memory, 2, [1, 2]) == [[[True, True], [True, False], [True, False]]] * 2


def of_two_sizes(rank: int) -> list[int]:
    """Five messages of two sizes."""
    link = Neighbour(pair_of())
    link.make_room(1024, CPU)
    found = []
    for number in range(5):
        tensors = [torch.full((4 + number % 2,), number)]
        if rank == 0:
            link.send(tensors)
            tensors[0].zero_()
        else:
            found += link.receive(tensors)[0].unique().tolist()
    return found


def test_messages_of_several_shapes():
    assert run_ranks(of_two_sizes, 2) == [[], [0, 1, 2, 3, 4]]


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
