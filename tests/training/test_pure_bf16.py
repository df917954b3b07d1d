"""`train.precision: pure_bf16`: weights, gradients and moments are bf16, and it trains, resumes and averages."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.test_interruptions import signal_self
from tests.runs import Runs

PURE = "train.precision=pure_bf16"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("pure_bf16"))
    assert runs.run("whole", PURE) == [0], runs.message("whole")
    return runs


def test_the_loss_falls(runs):
    found = runs.losses("whole")
    assert found[-1] < 0.8 * found[0]


def test_everything_kept_is_bf16(runs):
    assert {tensor.dtype for tensor in runs.weights("whole", 8).values()} == {torch.bfloat16}
    state = runs.folder / "whole" / "checkpoint-8" / "state"
    stored = [load_file(path) for path in sorted(state.glob("optimizer.exp_avg*.safetensors"))]
    assert {tensor.dtype for tensors in stored for tensor in tensors.values()} == {torch.bfloat16}
    assert not list(state.glob("optimizer.master*"))


def test_resumed_is_uninterrupted(runs):
    stop = {"prepare": signal_self, "number": signal.SIGTERM, "at_step": 3, "on_rank": 0}
    assert runs.run("resumed", PURE, **stop) == [143], runs.message("resumed")
    assert runs.run("resumed", PURE) == [0], runs.message("resumed")
    whole, resumed = runs.weights("whole", 8), runs.weights("resumed", 8)
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_two_ranks_follow_one(runs):
    options = [PURE, "train.per_device_train_batch_size=1", "model.hidden_dropout=0"]
    assert runs.run("pair", *options, world_size=2) == [0, 0], runs.message("pair", 1)
    assert runs.run("single", PURE, "model.hidden_dropout=0") == [0], runs.message("single")
    assert runs.losses("pair") == pytest.approx(runs.losses("single"), rel=2e-2)
