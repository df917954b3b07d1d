"""Backward passes of a pipeline in two halves: what is put off, until when, and that it changes no bit."""

from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
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


def commands(stages: int, micro_batches: int, kind: Callable[..., schedule.TrainSchedule]) -> list[list[str]]:
    """Of each stage."""
    plans = [kind(micro_batches=micro_batches, stages=stages, stage_id=stage) for stage in range(stages)]
    return [[type(command).__name__ for step in plan.steps() for command in step] for plan in plans]


def seconds(programs: list[list[str]], costs: dict[str, float], in_pairs: bool = True, last: float = 1.0) -> float:
    """Of a step of stages that do one thing after the other. in_pairs: who sends waits for who receives; else it goes
    on, and has sent when it comes to it. last: what passes of the last stage take, of another's."""
    clocks, at = [0.0] * len(programs), [0] * len(programs)
    sent: dict[tuple[int, int], deque[float]] = defaultdict(deque)

    def next_of(stage: int) -> str | None:
        return programs[stage][at[stage]] if at[stage] < len(programs[stage]) else None

    def run(stage: int, command: str) -> None:
        step, answer = NEIGHBOURS.get(command, (0, ""))
        other = stage + step
        if not answer:
            clocks[stage] += costs.get(command, 0.0) * (last if stage == len(programs) - 1 else 1.0)
        elif in_pairs:
            if next_of(other) != answer:
                return
            clocks[stage] = clocks[other] = max(clocks[stage], clocks[other])
            at[other] += 1
        elif command.startswith("Send"):
            sent[stage, other].append(clocks[stage])
        elif sent[other, stage]:
            clocks[stage] = max(clocks[stage], sent[other, stage].popleft())
        else:
            return
        at[stage] += 1

    while any(next_of(stage) for stage in range(len(programs))):
        before = list(at)
        for stage in range(len(programs)):
            if (command := next_of(stage)) is not None:
                run(stage, command)
        assert at != before, "stages wait for each other"
    return max(clocks)


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 16), (4, 32), (8, 32), (3, 7), (4, 2), (2, 1)])
def test_a_stage_waits_for_first_halves(stages, micro_batches):
    """Of p - 1 stages, where it waited for whole passes."""
    whole = seconds(commands(stages, micro_batches, schedule.TrainSchedule), COSTS | {"BackwardPass": 2.0})
    halves = seconds(commands(stages, micro_batches, SplitSchedule), COSTS)
    assert whole == 3 * (micro_batches + stages - 1)
    assert halves == whole - (stages - 1)
    by_copies = commands(stages, micro_batches, partial(SplitSchedule, in_pairs=False))
    assert seconds(by_copies, COSTS, in_pairs=False) == halves


@pytest.mark.parametrize("last", [0.8, 0.9, 0.95])
def test_a_quicker_last_stage_computes_products_while_it_waits_for_activations(last):
    """The first one waits for it once, at the beginning. In pairs, products were still to come when the last gradient
    was due."""
    programs = {pairs: commands(2, 16, partial(SplitSchedule, in_pairs=pairs)) for pairs in (True, False)}
    least = 3 * 16 + max(2 * last - 1, 0)
    assert seconds(programs[False], COSTS, in_pairs=False, last=last) == pytest.approx(least)
    assert seconds(programs[True], COSTS, last=last) > least + 0.3


@pytest.mark.parametrize("in_pairs", [True, False])
@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 3), (4, 5)])
def test_every_pass_has_its_second_half_before_the_next_and_the_step(stages, micro_batches, in_pairs):
    for program in commands(stages, micro_batches, partial(SplitSchedule, in_pairs=in_pairs)):
        order = [name for name in program if name in ("BackwardPass", "WeightGradients", "ReduceTiedGrads")]
        assert order == ["BackwardPass", "WeightGradients"] * micro_batches + ["ReduceTiedGrads"]
        for place, name in enumerate(program):
            if name == "SendGrad":
                behind = program[place + 1 : place + 3]
                assert "WeightGradients" in behind[: 1 + (in_pairs and behind[0] == "RecvActivation")]


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
    driver = SimpleNamespace(micro_batches=2, num_stages=2, stage_id=1, _INSTRUCTION_MAP=Driver._INSTRUCTION_MAP)
    pairs = iter([True, False])
    postponed = split_backward(driver, lambda: next(pairs))
    monkeypatch.setattr(
        Driver, "_exec_backward_pass", lambda self, buffer_id: postponed.take(lambda: log.append(buffer_id))
    )
    driver._INSTRUCTION_MAP[schedule.BackwardPass](driver, buffer_id=3)
    assert log == []
    driver._INSTRUCTION_MAP[WeightGradients](driver)
    assert log == [3]
    schedules = [driver._train_schedule() for _ in range(2)]
    assert all(isinstance(each, SplitSchedule) for each in schedules)
    assert [each._in_pairs for each in schedules] == [True, False]
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
    engine.driver = SimpleNamespace(_INSTRUCTION_MAP=Driver._INSTRUCTION_MAP)
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


FOUR_MICRO_BATCHES = ("model.hidden_dropout=0", "model.num_hidden_layers=3", "train.gradient_accumulation_steps=4")
"""Three stages, of which the middle one receives activations while products wait for what it has received before."""


@pytest.mark.parametrize(
    ("stages", "world_size", "more"),
    [(2, 2, ()), (3, 3, FOUR_MICRO_BATCHES), pytest.param(2, 4, (), marks=pytest.mark.slow)],
)
def test_halves_come_to_the_same_bits(runs, stages, world_size, more):
    name, settings = f"world-{world_size}", (f"parallel.pipeline={stages}", "train.precision=bf16", *more)
    for halves in (True, False):
        given = {"world_size": world_size, "prepare": in_halves_or_whole, "halves": halves}
        assert runs.run(f"{name}-{halves}", *settings, **given) == [0] * world_size, runs.message(f"{name}-{halves}")
        told = [runs.message(f"{name}-{halves}", rank).count(" products put off") for rank in range(world_size)]
        assert all(told) if halves else not any(told)
    assert "\n0 products put off" not in runs.message(f"{name}-True")
    for files in ("model*.safetensors", OPTIMIZER):
        halves, whole = (tensors(runs.folder / f"{name}-{each}" / "checkpoint-8", files) for each in (True, False))
        assert different(halves, whole) == []
