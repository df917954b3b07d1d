"""Runs of split models and of ZeRO-1 whose optimizer's step is the kernel's: the same curve, stops, and bad steps."""

from collections.abc import Callable

import pytest
import torch

from tests.faults.test_exit_codes import spoil
from tests.runs import Runs
from tests.training.test_pipeline_runs import OPTIMIZER, by_step, different, signal_in_step, tensors

TP2, ZERO1 = "parallel.tensor=2", "parallel.zero_stage=1"
PP2_DP2 = "parallel.pipeline=2"
LAYOUTS = [(TP2, 2), (ZERO1, 2), pytest.param(PP2_DP2, 4, marks=pytest.mark.slow)]
SETTINGS = ("train.precision=bf16", "train.gradient_accumulation_steps=1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("step-at-once"))


def by_kernel(rank: int, then: Callable | None = None, **given) -> None:
    """AdamW's step in Triton's interpreter, all else as it is on a CPU."""
    from neox_hf.training.deepspeed_step import StepAtOnce
    from neox_hf.training.fused_adamw import AdamW

    made, stepped = AdamW.__init__, StepAtOnce.step

    def init(self, *args, **kwargs):
        made(self, *args, **{**kwargs, "kernels": "triton"})

    def step(self, closure=None):
        print("stepped at once")
        stepped(self, closure)

    AdamW.__init__, StepAtOnce.step = init, step
    if then is not None:
        then(rank, **given)


def run(runs: Runs, name: str, *overrides: str, world_size: int, code: int = 0, **options) -> None:
    found = runs.run(name, *SETTINGS, *overrides, world_size=world_size, **options)
    told = "\n".join(runs.message(name, rank)[-2500:] for rank in range(world_size))
    assert found == [code] * world_size, told
    at_once = [runs.message(name, rank).count("stepped at once") for rank in range(world_size)]
    assert min(at_once) == max(at_once)
    assert bool(at_once[0]) is ("prepare" in options)


@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS)
def test_it_follows_deepspeeds_own_and_resumes_bit_for_bit(runs, layout, world_size):
    name = f"curve-{layout[9:].replace('=', '-')}"
    run(runs, f"{name}-apart", layout, world_size=world_size)
    run(runs, f"{name}-whole", layout, world_size=world_size, prepare=by_kernel)
    stop = {"then": signal_in_step, "at_step": 3, "on_rank": 1}
    run(runs, name, layout, world_size=world_size, code=143, prepare=by_kernel, **stop)
    run(runs, name, layout, world_size=world_size, prepare=by_kernel)
    whole, resumed = (runs.folder / of / "checkpoint-8" for of in (f"{name}-whole", name))
    for files in ("model*.safetensors", OPTIMIZER):
        assert different(tensors(whole, files), tensors(resumed, files)) == []
    log, apart = runs.log_history(f"{name}-whole", 8), runs.log_history(f"{name}-apart", 8)
    for key in ("loss", "grad_norm"):
        assert by_step(log, key) == pytest.approx(by_step(apart, key), rel=1e-3)
    masters = tensors(whole, "state/optimizer.master*")
    assert masters
    assert all(tensor.dtype == torch.float32 for tensor in masters.values())


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_step_that_is_not_finite(runs, policy):
    spoilt = {"prepare": by_kernel, "then": spoil, "at_steps": [4], "on_rank": 1}
    run(runs, policy, ZERO1, f"train.nan_policy={policy}", world_size=2, code=NAN_CODES[policy], **spoilt)
    check_spoilt(runs, policy, norm="inf")


NAN_CODES = {"raise": 4, "skip": 0}


def check_spoilt(runs: Runs, policy: str, norm: str) -> None:
    """Of a run that is called as its `nan_policy`: it has ended in the fourth step, or trained on."""
    if policy == "raise":
        assert f"error: step 4: the gradient norm is {norm}; the last checkpoint is unharmed" in runs.message(policy)
    else:
        assert all(tensor.isfinite().all() for tensor in runs.weights(policy, 8).values())
