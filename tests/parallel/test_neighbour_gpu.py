"""What two stages on GPUs send each other: whoever is behind, each message comes whole and in order, though what was
sent is overwritten at once."""

from multiprocessing import get_context

import pytest
import torch

from neox_hf.parallel.neighbour import Neighbour
from tests.gloo import run_ranks
from tests.parallel.two_devices import device_of, pair_in

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu]

ROWS, WIDTH = 4096, 1024
"""bf16, 8 MiB."""


def message(number, rows, device):
    random = torch.Generator(device).manual_seed(number)
    hidden = torch.randn(rows, WIDTH, generator=random, device=device).bfloat16()
    return [hidden, torch.arange(rows, device=device) * number]


def twelve(rank, link, rows, device):
    """The first stage sends as many, up to two ahead of the gradients that come back for them."""
    like, alike = message(0, rows, device), []

    def send(number):
        tensors = message(number, rows, device)
        link.send(tensors)
        for tensor in tensors:
            tensor.zero_()

    def receive(number):
        came = link.receive(like)
        alike.extend(torch.equal(a, b) for a, b in zip(came, message(number, rows, device), strict=True))

    for number in range(1, 13):
        if number % 3 == rank:
            torch.cuda._sleep(20_000_000)  # one is behind
        if rank == 0:
            send(number)
            if number > 2:
                receive(100 + number - 2)
        else:
            receive(number)
            send(100 + number)
    if rank == 0:
        for number in (11, 12):
            receive(100 + number)
    return alike


def back_and_forth(rank):
    """In memory that grows, and then has room to spare."""
    device = device_of(rank)
    link = Neighbour(pair_in(None))
    alike = []
    for rows in (ROWS, 2 * ROWS, ROWS // 4):
        link.make_room(rows * WIDTH * 2 + rows * 8, device)
        assert link.carries(message(0, rows, device))
        alike += twelve(rank, link, rows, device)
    return len(alike), all(alike), link._pair.made


def test_messages_between_stages():
    assert run_ranks(back_and_forth, 2, context=get_context("spawn")) == [(72, True, 2)] * 2
