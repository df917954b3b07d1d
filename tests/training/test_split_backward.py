"""Backward passes of a pipeline in two halves: what is put off, until when, and that it changes no bit."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine as Driver
from torch import nn

from neox_hf.training.deepspeed_gradients import SumInMasterGradient
from neox_hf.training.pipeline_engine import PipelineEngine
from neox_hf.training.split_backward import (
    PostponedProducts,
    SplitSchedule,
    WeightGradients,
    split_backward,
    with_weight_gradients,
)
from tests.runs import Runs
from tests.training.test_pipeline_runs import OPTIMIZER, different, tensors

COSTS = {"ForwardPass": 1.0, "BackwardPass": 1.0, "WeightGradients": 1.0}
"""A whole backward pass takes two forward passes."""

NEIGHBOURS = {
    "SendGrad": (-1, "RecvGrad"),
    "RecvGrad": (1, "SendGrad"),
    "SendActivation": (1, "RecvActivation"),
    "RecvActivation": (-1, "SendActivation"),
}


def commands(stages: int, micro_batches: int, kind: type[schedule.TrainSchedule]) -> list[list[str]]:
    """Of each stage."""
    plans = [kind(micro_batches=micro_batches, stages=stages, stage_id=stage) for stage in range(stages)]
    return [[type(command).__name__ for step in plan.steps() for command in step] for plan in plans]


def seconds(programs: list[list[str]], costs: dict[str, float]) -> float:
    """Of a step of stages that do one thing after the other, and wait for each other where they send and receive."""
    clocks, at = [0.0] * len(programs), [0] * len(programs)

    def next_of(stage: int) -> str | None:
        return programs[stage][at[stage]] if at[stage] < len(programs[stage]) else None

    while any(next_of(stage) for stage in range(len(programs))):
        before = list(at)
        for stage in range(len(programs)):
            command = next_of(stage)
            if command in NEIGHBOURS:
                step, answer = NEIGHBOURS[command]
                if next_of(stage + step) == answer:
                    clocks[stage] = clocks[stage + step] = max(clocks[stage], clocks[stage + step])
                    at[stage] += 1
                    at[stage + step] += 1
            elif command:
                clocks[stage] += costs.get(command, 0.0)
                at[stage] += 1
        assert at != before, "stages wait for each other"
    return max(clocks)


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 16), (4, 32), (8, 32), (3, 7), (4, 2), (2, 1)])
def test_a_stage_waits_for_first_halves(stages, micro_batches):
    """Of p - 1 stages, where it waited for whole passes."""
    whole = seconds(commands(stages, micro_batches, schedule.TrainSchedule), COSTS | {"BackwardPass": 2.0})
    halves = seconds(commands(stages, micro_batches, SplitSchedule), COSTS)
    assert whole == 3 * (micro_batches + stages - 1)
    assert halves == whole - (stages - 1)


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 3), (4, 5)])
def test_every_pass_has_its_second_half_before_the_next_and_the_step(stages, micro_batches):
    for program in commands(stages, micro_batches, SplitSchedule):
        order = [name for name in program if name in ("BackwardPass", "WeightGradients", "ReduceTiedGrads")]
        assert order == ["BackwardPass", "WeightGradients"] * micro_batches + ["ReduceTiedGrads"]
        for place, name in enumerate(program):
            if name == "SendGrad":
                behind = program[place + 1 : place + 3]
                assert "WeightGradients" in behind[: 1 + (behind[0] == "RecvActivation")]


def test_other_commands_stay_as_they_are():
    steps = list(schedule.TrainSchedule(micro_batches=4, stages=2, stage_id=1).steps())
    split = list(with_weight_gradients(steps))
    assert [[each for each in step if not isinstance(each, WeightGradients)] for step in split] == steps


def test_products_wait_in_their_order():
    postponed, log = PostponedProducts(), []
    postponed.take(lambda: log.append("at once"))
    with postponed.collected():
        postponed.take(lambda: log.append("first"))
        postponed.take(lambda: log.append("second"))
    assert log == ["at once"]
    postponed.compute()
    postponed.compute()
    assert log == ["at once", "first", "second"]


def test_a_backward_pass_that_fails_collects_no_more():
    postponed, log = PostponedProducts(), []
    with pytest.raises(RuntimeError), postponed.collected():
        raise RuntimeError
    postponed.take(lambda: log.append("at once"))
    assert log == ["at once"]


def test_the_sum_is_told_of_the_product_at_once_and_has_it_later():
    postponed, sums = PostponedProducts(), [torch.zeros(24)]
    optimizer = SimpleNamespace(fp32_groups_gradients=[sums], fp32_groups_has_gradients=[[False]])
    weight = nn.Parameter(torch.zeros(4, 6).bfloat16())
    total = SumInMasterGradient(optimizer, 0, 0, postponed)
    gradient, x = torch.randn(5, 4).bfloat16(), torch.randn(5, 6).bfloat16()
    with postponed.collected():
        total.add_product(weight, gradient, x)
    assert optimizer.fp32_groups_has_gradients == [[True]]
    assert not sums[0].any()
    postponed.compute()
    torch.testing.assert_close(sums[0], (gradient.float().t() @ x.float()).flatten())


def test_the_driver_runs_halves(monkeypatch):
    log = []
    driver = SimpleNamespace(micro_batches=2, num_stages=2, stage_id=1)
    postponed = split_backward(driver)
    monkeypatch.setattr(
        Driver, "_exec_backward_pass", lambda self, buffer_id: postponed.take(lambda: log.append(buffer_id))
    )
    driver._INSTRUCTION_MAP[schedule.BackwardPass](driver, buffer_id=3)
    assert log == []
    driver._INSTRUCTION_MAP[WeightGradients](driver)
    assert log == [3]
    assert isinstance(driver._train_schedule(), SplitSchedule)
    assert driver._INSTRUCTION_MAP.keys() == {*Driver._INSTRUCTION_MAP, WeightGradients}


@pytest.mark.parametrize(
    ("tensor", "pipeline", "recompute", "splits"),
    [(1, 2, "none", True), (1, 4, "none", True), (1, 2, "selective", False), (1, 2, "full", False),
     (2, 2, "none", False), (2, 1, "none", False)],
)  # fmt: skip
def test_who_splits(tensor, pipeline, recompute, splits):
    engine = object.__new__(PipelineEngine)
    engine.trainer = SimpleNamespace(args=SimpleNamespace(recompute=recompute))
    engine.topology = SimpleNamespace(tensor=tensor, pipeline=pipeline)
    engine.driver = SimpleNamespace()
    assert (engine.postponed_products() is not None) == splits


# Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("split-backward"))


def in_halves_or_whole(rank: int, halves: bool) -> None:
    """Says how many products were put off; or has none be."""
    from neox_hf.training.pipeline_engine import PipelineEngine
    from neox_hf.training.split_backward import PostponedProducts

    compute = PostponedProducts.compute

    def counted(self):
        print(f"{len(self._waiting)} products put off")
        compute(self)

    PostponedProducts.compute = counted
    if not halves:
        PipelineEngine.postponed_products = lambda self: None


@pytest.mark.parametrize(("stages", "world_size"), [(2, 2), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_halves_come_to_the_same_bits(runs, stages, world_size):
    name, settings = f"world-{world_size}", (f"parallel.pipeline={stages}", "train.precision=bf16")
    for halves in (True, False):
        given = {"world_size": world_size, "prepare": in_halves_or_whole, "halves": halves}
        assert runs.run(f"{name}-{halves}", *settings, **given) == [0] * world_size, runs.message(f"{name}-{halves}")
        told = [runs.message(f"{name}-{halves}", rank).count(" products put off") for rank in range(world_size)]
        assert all(told) if halves else not any(told)
    assert "\n0 products put off" not in runs.message(f"{name}-True")
    for files in ("model*.safetensors", OPTIMIZER):
        halves, whole = (tensors(runs.folder / f"{name}-{each}" / "checkpoint-8", files) for each in (True, False))
        assert different(halves, whole) == []
