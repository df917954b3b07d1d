"""The main job on a CUDA device: bf16 with fp32 masters trains, resumes bit for bit, and agrees with fp32."""

import pytest
import torch

from tests.runs import Runs

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("cuda"))
    for precision in ("fp32", "amp", "bf16", "pure_bf16", "fp8"):
        name = f"whole-{precision}"
        assert runs.run(name, f"train.precision={precision}", "train.full_determinism=true") == [0], runs.message(name)
    return runs


@pytest.mark.parametrize("precision", ["fp32", "amp", "bf16", "pure_bf16", "fp8"])
def test_loss_falls_and_precisions_agree(runs, precision):
    ours, truth = runs.losses(f"whole-{precision}"), runs.losses("whole-fp32")
    assert ours[-1] < 0.8 * ours[0]
    assert ours == pytest.approx(truth, rel=2e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16", "fp8"])
def test_resumed_is_uninterrupted(runs, precision):
    name = f"resumed-{precision}"
    options = [f"train.precision={precision}", "train.full_determinism=true"]
    assert runs.run(name, *options, prepare=stop_after_four) == [143], runs.message(name)
    assert runs.run(name, *options) == [0], runs.message(name)
    whole, resumed = runs.weights(f"whole-{precision}", 8), runs.weights(name, 8)
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def stop_after_four(rank: int) -> None:
    import signal

    from tests.faults.test_interruptions import signal_self

    signal_self(rank, signal.SIGTERM, at_step=3, on_rank=0)
