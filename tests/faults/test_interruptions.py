"""A run that is killed or stopped, and resumed, ends with the weights of the run that was never interrupted."""

import hashlib
import json
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.runs import Runs, exit_codes, kill_self

WRITER_PHASES = [
    "write_weights",
    "write_boxes",
    "write_json",
    "write_tensors",
    "seal",
    "write_manifest",
    "make_names_durable",
    "rename",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("interruptions"))
    assert runs.run("whole", prepare=record_tokens, path=runs.folder / "whole.tokens") == [0], runs.message("whole")
    return runs


def record_tokens(rank: int, path: Path) -> None:
    """Append the step and a digest of each micro-batch that reaches the engine."""
    from neox_hf.training.engine import NativeEngine

    stock = NativeEngine.step

    def step(engine, model, micro_batch, num_items):
        digest = hashlib.sha256(micro_batch["input_ids"].numpy().tobytes()).hexdigest()
        with path.open("a") as file:
            file.write(json.dumps([engine.trainer.state.global_step, digest]) + "\n")
        return stock(engine, model, micro_batch, num_items)

    NativeEngine.step = step


def kill_in_step(rank: int, at_step: int, path: Path) -> None:
    """Die between the two micro-batches of a step."""
    from neox_hf.training.engine import NativeEngine

    record_tokens(rank, path)
    recorded, seen = NativeEngine.step, []

    def step(engine, model, micro_batch, num_items):
        if engine.trainer.state.global_step == at_step:
            seen.append(None)
            if len(seen) == 2:
                kill_self()
        return recorded(engine, model, micro_batch, num_items)

    NativeEngine.step = step


def kill_in_phase(rank: int, phase: str, when: str) -> None:
    """Die while the checkpoint of step 4 is being written, before or after one phase of it."""
    from neox_hf.checkpoint import CheckpointWriter

    stock = getattr(CheckpointWriter, phase)

    def dying(writer, *args, **kwargs):
        if writer.step == 4 and when == "before":
            kill_self()
        answer = stock(writer, *args, **kwargs)
        if writer.step == 4:
            kill_self()
        return answer

    setattr(CheckpointWriter, phase, dying)


def assert_same_end(runs: Runs, name: str) -> None:
    whole, resumed = runs.weights("whole", 8), runs.weights(name, 8)
    assert whole.keys() == resumed.keys()
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def tokens_by_step(path: Path) -> dict[int, list[str]]:
    """The digests of each step; of a step that ran twice, the two micro-batches of the last time."""
    by_step: dict[int, list[str]] = {}
    for line in path.read_text().splitlines():
        step, digest = json.loads(line)
        by_step.setdefault(step, []).append(digest)
    return {step: digests[-2:] for step, digests in by_step.items()}


@pytest.mark.parametrize("at_step", [1, 5])
def test_killed_in_the_middle_of_a_step(runs, at_step):
    name = f"killed-{at_step}"
    tokens = runs.folder / f"{name}.tokens"
    # Measuring the device's peak, as a run does by default, must leave the run's random numbers alone.
    measured = "train.peak_tflops=null"
    assert runs.run(name, measured, prepare=kill_in_step, at_step=at_step, path=tokens) == [-signal.SIGKILL]
    assert runs.run(name, measured, prepare=record_tokens, path=tokens) == [0], runs.message(name)
    assert_same_end(runs, name)
    assert tokens_by_step(tokens) == tokens_by_step(runs.folder / "whole.tokens")


@pytest.mark.parametrize(("phase", "when"), [*((phase, "before") for phase in WRITER_PHASES), ("rename", "after")])
@pytest.mark.parametrize("background", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_killed_while_a_checkpoint_is_written(runs, phase, when, background):
    name = f"{phase}-{when}-{background}"
    how = f"train.save_in_background={str(background).lower()}"
    assert runs.run(name, how, prepare=kill_in_phase, phase=phase, when=when) == [-signal.SIGKILL]
    assert runs.run(name) == [0], runs.message(name)
    finished = phase == "rename" and when == "after"
    assert f"resuming from {runs.folder / name}/checkpoint-{4 if finished else 2}" in runs.message(name)
    assert_same_end(runs, name)


def signal_self(rank: int, number: int, at_step: int, on_rank: int) -> None:
    """Receive a signal in the middle of a step, on one rank only."""
    import os

    from neox_hf.training.engine import NativeEngine

    stock = NativeEngine.step

    def step(engine, model, micro_batch, num_items):
        if rank == on_rank and engine.trainer.state.global_step == at_step:
            os.kill(os.getpid(), number)
        return stock(engine, model, micro_batch, num_items)

    NativeEngine.step = step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stopped_politely(runs, number):
    name = f"stopped-{number}"
    assert runs.run(name, prepare=signal_self, number=number, at_step=4, on_rank=0) == [143], runs.message(name)
    assert "after saving step 5" in runs.message(name)
    assert (runs.folder / name / "checkpoint-5").is_dir()
    assert runs.run(name) == [0], runs.message(name)
    assert_same_end(runs, name)


@pytest.fixture(scope="module")
def whole_pair(runs) -> Runs:
    assert runs.run("pair", "train.per_device_train_batch_size=1", world_size=2) == [0, 0], runs.message("pair", 1)
    return runs


def test_a_signal_on_one_rank_stops_all_at_one_step(whole_pair):
    runs, name = whole_pair, "pair-stopped"
    one = "train.per_device_train_batch_size=1"
    codes = runs.run(name, one, world_size=2, prepare=signal_self, number=signal.SIGTERM, at_step=2, on_rank=1)
    assert codes == [143, 143], runs.message(name)
    assert (runs.folder / name / "checkpoint-3").is_dir()
    assert runs.run(name, one, world_size=2) == [0, 0], runs.message(name, 1)
    whole, resumed = runs.weights("pair", 8), runs.weights(name, 8)
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_survivors_of_a_dead_peer_end_without_saving(runs):
    ranks = runs.start(
        "orphan",
        "train.per_device_train_batch_size=1",
        "train.save_in_background=false",  # the dead one may not have finished its part
        world_size=2,
        prepare=kill_second_rank,
        at_step=3,
    )
    ranks[1].join(60)
    begin = time.monotonic()
    ranks[0].terminate()  # as a launcher does
    codes = exit_codes(ranks)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, 143)
    assert time.monotonic() - begin < 60
    assert sorted(path.name for path in (runs.folder / "orphan").glob("checkpoint-*")) == ["checkpoint-2"]


def kill_second_rank(rank: int, at_step: int) -> None:
    if rank == 1:
        kill_in_step(rank, at_step, Path("/dev/null"))


def test_a_stop_keeps_what_it_has_saved_beside_the_best(runs):
    best = (
        "train={eval_strategy: steps, eval_steps: 2, load_best_model_at_end: true, save_total_limit: 1, "
        "metric_for_best_model: loss, greater_is_better: true}"
    )
    stopped = {"prepare": signal_self, "number": signal.SIGTERM, "at_step": 6, "on_rank": 0}
    assert runs.run("best", best, **stopped) == [143], runs.message("best")
    assert sorted(path.name for path in (runs.folder / "best").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-7"]


def kill_in_first_step(rank: int) -> None:
    """Die once `checkpoint-0` is whole."""
    from neox_hf.training.engine import NativeEngine

    def step(engine, *given):
        engine.trainer.run_state.wait()
        kill_self()

    NativeEngine.step = step


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_run_killed_in_its_first_step_goes_on_at_another_layout(runs, background):
    name = f"first-step-{background}"
    options = ["train.save_schedule=pythia", f"train.save_in_background={background}"]
    alone, shared = (f"train.per_device_train_batch_size={size}" for size in (2, 1))
    assert runs.run(name, *options, alone, prepare=kill_in_first_step) == [-signal.SIGKILL]
    saved = (runs.folder / name / "checkpoint-0" / "manifest.json").read_text()
    assert runs.run(name, *options, shared, world_size=2) == [0, 0], runs.message(name)
    assert (runs.folder / name / "checkpoint-0" / "manifest.json").read_text() == saved
