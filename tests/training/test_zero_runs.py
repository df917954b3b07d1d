"""A run under ZeRO is as any other beside its steps, too: it stops, resumes, evaluates, meets what is not finite."""

import json
import re
import signal
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.test_exit_codes import spoil
from tests.faults.test_interruptions import signal_self
from tests.runs import Runs

STAGES = ["parallel.zero_stage=1", "parallel.zero_stage=3"]
LAST_STAGE_FAST = [pytest.param(STAGES[0], marks=pytest.mark.slow), STAGES[1]]
ONE_EACH = "train.gradient_accumulation_steps=1"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("zero-runs"))


def run(runs: Runs, name: str, *overrides: str, codes: int = 0, **options) -> None:
    found = runs.run(name, ONE_EACH, *overrides, world_size=2, **options)
    assert set(found) == {codes}, "\n".join(runs.message(name, rank)[-2000:] for rank in range(2))


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        ("parallel.zero_stage=1", "bf16"),
        ("parallel.zero_stage=3", "fp32"),
        ("parallel={zero_stage: 2, offload: optimizer}", "bf16"),
        pytest.param("parallel.zero_stage=1", "fp32", marks=pytest.mark.slow),
        pytest.param("parallel.zero_stage=3", "bf16", marks=pytest.mark.slow),
        pytest.param("parallel={zero_stage: 3, offload: optimizer}", "bf16", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(runs, stage, precision):
    name, how = f"stopped-{re.sub('[^a-z0-9]+', '-', stage)}-{precision}", f"train.precision={precision}"
    stopped = {"prepare": signal_self, "number": signal.SIGTERM, "at_step": 3, "on_rank": 1}
    run(runs, f"{name}-whole", stage, how)
    run(runs, name, stage, how, codes=143, **stopped)
    run(runs, name, stage, how)
    whole, resumed = runs.weights(f"{name}-whole", 8), runs.weights(name, 8)
    assert whole.keys() == resumed.keys()
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
    assert runs.log_history(name, 8)[-1]["loss"] == runs.log_history(f"{name}-whole", 8)[-1]["loss"]


@pytest.mark.parametrize("stage", LAST_STAGE_FAST)
def test_the_best_weights_are_loaded_at_the_end(runs, stage):
    """The rate falls off a cliff upwards, so that the first evaluation stays the best."""
    name = f"best-{stage[-1]}"
    evaluated = "train={eval_strategy: steps, eval_steps: 2, eval_on_start: true, load_best_model_at_end: true}"
    run(runs, name, stage, evaluated, "train.lr_decay_style=constant", "train.learning_rate=0.5")
    state = json.loads((runs.folder / name / "trainer_state.json").read_text())
    assert state["best_global_step"] < 8
    final = load_file(runs.folder / name / "model.safetensors")
    best = runs.weights(name, state["best_global_step"])
    assert [key for key in best if not torch.equal(best[key], final[key])] == []
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert len(losses) == 5


NOT_FINITE = [("parallel.zero_stage=1", "bf16"), ("parallel.zero_stage=3", "fp32")]


@pytest.mark.parametrize(("stage", "precision"), NOT_FINITE)
def test_a_step_that_is_not_finite_ends_the_run(runs, stage, precision):
    name = f"nan-{stage[-1]}"
    run(runs, name, stage, f"train.precision={precision}", codes=4, prepare=spoil, at_steps=[4], on_rank=1)
    assert "error: step 4: the gradient norm is inf; the last checkpoint is unharmed" in runs.message(name)


@pytest.mark.parametrize(("stage", "precision"), NOT_FINITE)
def test_a_step_that_is_not_finite_is_skipped(runs, stage, precision):
    name, skipping = f"skip-{stage[-1]}", ["train.nan_policy=skip", "train.save_steps=1"]
    run(runs, name, stage, f"train.precision={precision}", *skipping, prepare=spoil, at_steps=[4], on_rank=1)
    before, after = runs.weights(name, 3), runs.weights(name, 4)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    entries = {entry["step"]: entry for entry in runs.log_history(name, 8) if "loss" in entry}
    assert (entries[4]["grad_norm"], entries[8]["skipped_steps"]) == (float("inf"), 1)
    # The schedule goes on, as it does without DeepSpeed: of 8 steps with 2 of warm-up, rates fall from the third on.
    rates = [entries[step]["learning_rate"] for step in range(1, 9)]
    assert rates[0] < rates[2]
    assert all(later < earlier for earlier, later in pairwise(rates[2:]))


def evaluate_first(rank: int) -> None:
    """Evaluate before training, and again in it at step 0."""
    from neox_hf.training.trainer import NeoXTrainer

    stock = NeoXTrainer.train

    def train(trainer, *args, **kwargs):
        print("before training:", trainer.evaluate()["eval_loss"])
        return stock(trainer, *args, **kwargs)

    NeoXTrainer.train = train


@pytest.mark.parametrize("stage", LAST_STAGE_FAST)
def test_an_evaluation_before_training(runs, stage):
    name = f"before-{stage[-1]}"
    run(runs, name, stage, "train={eval_strategy: steps, eval_on_start: true}", prepare=evaluate_first)
    said = next(line for line in runs.message(name).splitlines() if line.startswith("before training:"))
    (first,) = [entry["eval_loss"] for entry in runs.log_history(name, 8) if entry["step"] == 0]
    assert float(said.split(":")[1]) == pytest.approx(first, rel=1e-6)


def overflow_in_fp16(rank: int, at_steps: list[int]) -> None:
    """Let the CPU do what it can but must not be asked for, and make the gradients of some steps overflow."""
    import os

    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import get_accelerator

    from neox_hf.training import recipe_parallel

    type(get_accelerator()).is_fp16_supported = lambda _: True
    recipe_parallel._precision_problems = lambda *_: []
    spoil(rank, at_steps)


@pytest.mark.parametrize("stage", [STAGES[0], pytest.param(STAGES[1], marks=pytest.mark.slow)])
def test_fp16_finds_its_scale_by_overflowing(runs, stage):
    """With `nan_policy: raise`, too: DeepSpeed bears one overflow and halves the scale at the second."""
    name = f"fp16-{stage[-1]}"
    run(runs, name, stage, "train.precision=fp16", prepare=overflow_in_fp16, at_steps=[2, 3])
    entries = {entry["step"]: entry for entry in runs.log_history(name, 8) if "loss" in entry}
    assert [entries[step]["grad_norm"] == float("inf") for step in (1, 2, 3, 4)] == [False, True, True, False]
    assert (entries[8]["skipped_steps"], entries[8]["loss"] < entries[1]["loss"]) == (2, True)
    scale = json.loads((runs.folder / name / "checkpoint-8" / "state" / "loss_scale.json").read_text())
    assert scale == {"cur_scale": 2**15, "cur_iter": 8, "last_overflow_iter": 2, "cur_hysteresis": 1}
    assert {tensor.dtype for tensor in runs.weights(name, 8).values()} == {torch.float16}
