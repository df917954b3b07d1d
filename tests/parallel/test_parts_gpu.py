"""On two GPUs, by NCCL: parts come to the bits of wholes, and a stopped run goes on bit for bit."""

from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist

from tests.gloo import run_ranks
from tests.parallel.test_parts import NEVER_CLIPS, stepped
from tests.parallel.two_devices import device_of
from tests.runs import Runs
from tests.training.test_cuda import stop_after_four
from tests.training.test_pipeline_runs import OPTIMIZER, different, run, tensors

pytestmark = pytest.mark.multigpu


def by_nccl(rank: int, cut: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    device = device_of(rank)
    return stepped(rank, cut, "triton", NEVER_CLIPS, device, dist.new_group(backend="nccl"))


def test_parts_come_to_the_bits_of_wholes():
    whole, cut = (run_ranks(by_nccl, 2, cut, context=get_context("spawn")) for cut in (False, True))
    for weights, norms in cut:
        assert all(map(torch.equal, weights, whole[0][0]))
        torch.testing.assert_close(norms, whole[0][1])


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, precision):
    runs, options = Runs(tmp_path), (f"train.precision={precision}", "train.full_determinism=true")
    run(runs, "whole", *options)
    run(runs, "stopped", *options, code=143, prepare=stop_after_four)
    run(runs, "stopped", *options)
    whole, resumed = (runs.folder / name / "checkpoint-8" for name in ("whole", "stopped"))
    for files in ("model*.safetensors", OPTIMIZER):
        assert different(tensors(whole, files), tensors(resumed, files)) == []
