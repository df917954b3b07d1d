"""Replicas whose optimizers step a part each: the curve of one process, stops, and bad steps."""

import re
import signal

import pytest
import torch

from tests.faults.test_exit_codes import spoil
from tests.faults.test_interruptions import signal_self
from tests.runs import Runs
from tests.training.test_pipeline_runs import OPTIMIZER, by_step, different, run, tensors
from tests.training.test_step_at_once_runs import NAN_CODES, check_spoilt

BF16, ONE_AT_A_TIME = "train.precision=bf16", "train.per_device_train_batch_size=1"
WITHOUT_DROPOUT = "model.hidden_dropout=0"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("replicas"))
    run(runs, "whole", BF16, ONE_AT_A_TIME)
    return runs


def tell_parts(rank: int) -> None:
    """Print what an optimizer steps and keeps."""
    from neox_hf.parallel.parts import ParameterPart
    from neox_hf.training.fused_adamw import AdamW

    stepped = AdamW.step

    def step(self, closure=None):
        stepped(self, closure)
        parts = sum(isinstance(p, ParameterPart) for group in self.param_groups for p in group["params"])
        moments = sum(state["exp_avg"].numel() for state in self.state.values())
        print(f"{parts} parts; {moments} moments")

    AdamW.step = step


def told(runs: Runs, name: str, rank: int = 0) -> tuple[int, int]:
    """Parts and moments of a rank."""
    parts, moments = re.search(r"^(\d+) parts; (\d+) moments$", runs.message(name, rank), re.MULTILINE).groups()
    return int(parts), int(moments)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_they_follow_one_process_with_a_part_of_its_state_each(runs, world_size):
    one, several = f"one-of-{world_size}", f"all-{world_size}"
    run(runs, one, BF16, WITHOUT_DROPOUT, world_size=1, prepare=tell_parts)
    as_many = f"train.gradient_accumulation_steps={4 // world_size}"
    run(runs, several, BF16, WITHOUT_DROPOUT, ONE_AT_A_TIME, as_many, world_size=world_size, prepare=tell_parts)
    log, alone = runs.log_history(several, 8), runs.log_history(one, 8)
    for key in ("loss", "grad_norm"):
        assert by_step(log, key) == pytest.approx(by_step(alone, key), rel=5e-3)
    none, moments = told(runs, one)
    assert none == 0
    for rank in range(world_size):
        parts, mine = told(runs, several, rank)
        assert parts > 0
        assert mine == moments / world_size


def test_a_stopped_run_goes_on_bit_for_bit(runs):
    stop = {"prepare": signal_self, "number": signal.SIGTERM, "at_step": 3, "on_rank": 1}
    run(runs, "stopped", BF16, ONE_AT_A_TIME, code=143, **stop)
    run(runs, "stopped", BF16, ONE_AT_A_TIME)
    whole, resumed = (runs.folder / name / "checkpoint-8" for name in ("whole", "stopped"))
    for files in ("model*.safetensors", OPTIMIZER):
        assert different(tensors(whole, files), tensors(resumed, files)) == []
    masters = tensors(resumed, "state/optimizer.master*")
    assert masters
    assert all(tensor.dtype == torch.float32 for tensor in masters.values())


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_step_that_is_not_finite(runs, policy):
    spoilt = {"prepare": spoil, "at_steps": [4], "on_rank": 1}
    run(runs, policy, BF16, ONE_AT_A_TIME, f"train.nan_policy={policy}", code=NAN_CODES[policy], **spoilt)
    check_spoilt(runs, policy, norm="nan")
