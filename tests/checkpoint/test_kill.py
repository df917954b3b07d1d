"""SIGKILL in every phase of writing a checkpoint leaves a valid one, and the next writer cleans up."""

import shutil
import signal
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch

from neox_hf.checkpoint import Box, fill_boxes, find_latest, open_checkpoint
from tests.checkpoint.conftest import build
from tests.checkpoint.dying_writer import PHASES, write, write_and_die, write_and_die_in_a_file, write_of_two
from tests.gloo import fork_server, free_port

OLD, NEW = 1.0, 2.0


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    return fork_server()


@pytest.fixture(scope="module")
def old_run(tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("old")
    write(output_dir, 2, OLD)
    return output_dir


@pytest.fixture
def output_dir(old_run, tmp_path) -> Path:
    return Path(shutil.copytree(old_run, tmp_path / "run"))


def kill(server: ForkServerContext, target, *args) -> None:
    child = server.Process(target=target, args=args)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


def value_of(path: Path) -> float:
    """The value that every part of the checkpoint holds."""
    checkpoint = open_checkpoint(path)
    model, box = build("ours", num_hidden_layers=1), torch.zeros(8)
    checkpoint.load_weights(model)
    fill_boxes([Box.whole("w", box)], checkpoint.boxes("optimizer.exp_avg"))
    values = {
        checkpoint.manifest.metadata["value"],
        checkpoint.json("state/data.json")["value"],
        *box.tolist(),
        *model.lm_head.weight.flatten().tolist(),
    }
    (value,) = values
    return value


def check_aftermath(output_dir: Path, step: int, exists: bool) -> None:
    found = find_latest(output_dir)
    assert found.passed_over == []
    assert value_of(found.path) == (NEW if exists else OLD)
    write(output_dir, step, NEW)
    kept = {"checkpoint-2", f"checkpoint-{step}"}
    assert {entry.name for entry in output_dir.iterdir()} == kept
    assert value_of(output_dir / f"checkpoint-{step}") == NEW


STEPS = pytest.mark.parametrize("step", [2, 3], ids=["same_step", "next_step"])
ASYNCHRONOUS = pytest.mark.parametrize("asynchronous", [False, True], ids=["at_once", "in_background"])


@pytest.mark.parametrize("phase", PHASES)
@STEPS
@ASYNCHRONOUS
def test_killed_before_a_phase(server, output_dir, step, phase, asynchronous):
    kill(server, write_and_die, output_dir, step, NEW, phase, "before", asynchronous)
    check_aftermath(output_dir, step, exists=phase == "remove_set_aside")


@STEPS
@ASYNCHRONOUS
def test_killed_at_the_very_end(server, output_dir, step, asynchronous):
    kill(server, write_and_die, output_dir, step, NEW, PHASES[-1], "after", asynchronous)
    check_aftermath(output_dir, step, exists=True)


@pytest.mark.parametrize("name", ["model-00001-of-00004.safetensors", "manifest.json"])
@STEPS
@ASYNCHRONOUS
def test_killed_with_half_a_file_written(server, output_dir, step, name, asynchronous):
    kill(server, write_and_die_in_a_file, output_dir, step, NEW, name, asynchronous)
    check_aftermath(output_dir, step, exists=False)


@pytest.mark.parametrize(
    ("phase", "dying"),
    [
        *((phase, 0) for phase in PHASES if phase not in ("write_json", "write_weights")),
        *((phase, 1) for phase in ("write_boxes", "write_deferred", "seal")),
    ],
)
@ASYNCHRONOUS
def test_one_of_two_ranks_is_killed(server, output_dir, phase, dying, asynchronous):
    """The one before stays valid, or the new one is there whole; the survivor fails instead of waiting for ever."""
    port = free_port()
    ranks = [
        server.Process(target=write_of_two, args=(rank, port, output_dir, 3, NEW, phase, dying, asynchronous))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert ranks[dying].exitcode == -signal.SIGKILL
    assert ranks[1 - dying].exitcode not in (0, None)
    check_aftermath(output_dir, 3, exists=phase == "remove_set_aside")
