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


def message(number, device):
    random = torch.Generator(device).manual_seed(number)
    hidden = torch.randn(ROWS, WIDTH, generator=random, device=device).bfloat16()
    return [hidden, torch.arange(ROWS, device=device) * number]


def back_and_forth(rank):
    """The first stage sends 12 messages, up to two ahead of the gradients that come back for them."""
    device = device_of(rank)
    link = Neighbour(pair_in(None))
    link.make_room(ROWS * WIDTH * 2 + ROWS * 8, device)
    like, alike = message(0, device), []

    def send(number):
        tensors = message(number, device)
        link.send(tensors)
        for tensor in tensors:
            tensor.zero_()

    def receive(number):
        came = link.receive(like)
        alike.extend(torch.equal(a, b) for a, b in zip(came, message(number, device), strict=True))

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
    return len(alike), all(alike)


def test_messages_between_stages():
    assert run_ranks(back_and_forth, 2, context=get_context("spawn")) == [(24, True)] * 2
