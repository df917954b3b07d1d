"""On two GPUs, by NCCL, parts come to the bits of wholes too."""

from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist

from tests.gloo import run_ranks
from tests.parallel.test_parts import NEVER_CLIPS, stepped
from tests.parallel.two_devices import device_of

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu]


def by_nccl(rank: int, cut: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    device = device_of(rank)
    return stepped(rank, cut, "triton", NEVER_CLIPS, device, dist.new_group(backend="nccl"))


def test_parts_come_to_the_bits_of_wholes():
    whole, cut = (run_ranks(by_nccl, 2, cut, context=get_context("spawn")) for cut in (False, True))
    for weights, norms in cut:
        assert all(map(torch.equal, weights, whole[0][0]))
        torch.testing.assert_close(norms, whole[0][1])
