"""Checkpoints written while training goes on: nothing of the step's later work reaches them, and no error is lost."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from neox_hf.checkpoint import (
    Box,
    CheckpointSaver,
    CheckpointWriter,
    background,
    fill_boxes,
    find_latest,
    open_checkpoint,
    write_rng,
)
from neox_hf.errors import CheckpointError
from neox_hf.parallel.topology import Topology
from tests.checkpoint.conftest import build
from tests.gloo import run_ranks


def begin(saver: CheckpointSaver, output_dir: Path, step: int, value: float, then=lambda path: None) -> None:
    """Start a checkpoint whose every part holds `value`; the tensors are spoilt as soon as `commit` returns."""
    topology = saver.topology
    world = {"rank": topology.rank, "world_size": topology.world_size}
    barrier = dist.barrier if topology.world_size > 1 else lambda: None
    writer = CheckpointWriter(output_dir, step, **world, barrier=barrier, memory=saver.memory)
    model, part = build("stock", num_hidden_layers=1), torch.full((4,), value)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(value)
    writer.write_weights(model, topology=topology)
    writer.write_boxes("optimizer.exp_avg", [Box("w", (4 * topology.rank,), (4 * topology.world_size,), part)])
    write_rng(writer)
    saver.commit(writer, {"value": value}, then)
    with torch.no_grad():
        part.fill_(-1.0)
        model.get_output_embeddings().weight.fill_(-1.0)


def value_of(path: Path) -> float:
    checkpoint = open_checkpoint(path)
    model, box = build("ours", num_hidden_layers=1), torch.zeros(4 * checkpoint.manifest.world_size)
    checkpoint.load_weights(model)
    fill_boxes([Box.whole("w", box)], checkpoint.boxes("optimizer.exp_avg"))
    (value,) = {checkpoint.manifest.metadata["value"], *box.tolist(), *model.lm_head.weight.flatten().tolist()}
    return value


def slow_down(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Background threads stand still before they seal, until the event is set."""
    go_on, seal = threading.Event(), CheckpointWriter.seal

    def waiting(writer):
        assert go_on.wait(30)
        seal(writer)

    monkeypatch.setattr(CheckpointWriter, "seal", waiting)
    return go_on


def test_the_step_goes_on_and_its_work_stays_out(tmp_path, monkeypatch):
    go_on, finished = slow_down(monkeypatch), []
    saver = CheckpointSaver(Topology.single(), asynchronous=True)
    begin(saver, tmp_path, 3, 1.0, finished.append)
    assert find_latest(tmp_path).path is None
    assert finished == []
    go_on.set()
    saver.wait()
    assert finished == [tmp_path / "checkpoint-3"]
    assert value_of(tmp_path / "checkpoint-3") == 1.0
    saver.wait()


def test_at_once_there_is_nothing_to_wait_for(tmp_path):
    finished = []
    saver = CheckpointSaver(Topology.single(), asynchronous=False)
    begin(saver, tmp_path, 3, 1.0, finished.append)
    assert finished == [tmp_path / "checkpoint-3"]
    saver.wait()
    assert value_of(tmp_path / "checkpoint-3") == 1.0


def test_only_one_is_in_flight(tmp_path):
    saver = CheckpointSaver(Topology.single(), asynchronous=True)
    begin(saver, tmp_path, 3, 1.0)
    with pytest.raises(AssertionError, match="must be waited for"):
        saver.commit(CheckpointWriter(tmp_path / "other", 4, memory=saver.memory), {}, lambda path: None)
    saver.wait()


def test_the_next_one_is_copied_to_where_the_one_before_was(tmp_path):
    saver = CheckpointSaver(Topology.single(), asynchronous=True)
    begin(saver, tmp_path, 3, 1.0)
    saver.wait()
    kept = saver.memory.size
    begin(saver, tmp_path, 4, 2.0)
    saver.wait()
    assert saver.memory.size == kept > 0
    assert [value_of(tmp_path / f"checkpoint-{step}") for step in (3, 4)] == [1.0, 2.0]


@pytest.mark.parametrize("begun", [False, True])
def test_what_could_not_be_written_leaves_its_memory(tmp_path, begun):
    """Whether the writing failed, or what came before."""
    saver = CheckpointSaver(Topology.single(), asynchronous=True)
    writer = CheckpointWriter(tmp_path, 1, memory=saver.memory)
    writer.write_boxes("optimizer.exp_avg", [Box.whole("w", torch.ones(4))])
    if begun:
        (tmp_path / "tmp-checkpoint-1" / "state").rmdir()
        (tmp_path / "tmp-checkpoint-1" / "state").write_text("in the way")
        saver.commit(writer, {}, lambda path: None)
        with pytest.raises(CheckpointError):
            saver.wait()
    saver.wait()
    place = saver.memory.copy(torch.ones(4)).data_ptr()
    saver.memory.clear()
    assert saver.memory.copy(torch.ones(4)).data_ptr() == place


def test_an_interrupt_while_waiting_leaves_it_in_flight(tmp_path, monkeypatch):
    go_on = slow_down(monkeypatch)
    saver = CheckpointSaver(Topology.single(), asynchronous=True)
    begin(saver, tmp_path, 3, 1.0)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(background, "together", interrupt)
        with pytest.raises(KeyboardInterrupt):
            saver.wait()
    go_on.set()
    saver.wait()
    assert value_of(tmp_path / "checkpoint-3") == 1.0


def interrupt(*given: object) -> None:
    raise KeyboardInterrupt


def test_a_writer_without_copies_is_not_taken(tmp_path):
    with pytest.raises(AssertionError, match="copies of its own"):
        CheckpointSaver(Topology.single(), asynchronous=True).commit(CheckpointWriter(tmp_path, 1), {}, print)


def fail(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_told_by_the_next_wait(tmp_path, monkeypatch):
    saver = CheckpointSaver(Topology.single(), asynchronous=True)
    begin(saver, tmp_path, 2, 1.0)
    saver.wait()
    with monkeypatch.context() as patch:
        patch.setattr("neox_hf.checkpoint.writer.write_tensors", fail)
        begin(saver, tmp_path, 3, 2.0)
        with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device\. Earlier checkpoints"):
            saver.wait()
    assert value_of(find_latest(tmp_path).path) == 1.0
    begin(saver, tmp_path, 3, 3.0)
    saver.wait()
    assert value_of(find_latest(tmp_path).path) == 3.0


def test_what_follows_may_fail_too(tmp_path):
    saver = CheckpointSaver(Topology.single(), asynchronous=True)
    begin(saver, tmp_path, 3, 1.0, lambda path: {}["publisher"])
    with pytest.raises(CheckpointError, match="the checkpoint of step 3 failed: KeyError: 'publisher'"):
        saver.wait()
    assert value_of(tmp_path / "checkpoint-3") == 1.0


def two_ranks(rank: int, folder: str) -> list[str]:
    topology, output_dir = Topology.from_world(2, rank), Path(folder)
    saver = CheckpointSaver(topology, asynchronous=True)
    begin(saver, output_dir, 1, 1.0)
    for step in (2, 3):
        saver.wait()
        assert value_of(output_dir / f"checkpoint-{step - 1}") == step - 1
        begin(saver, output_dir, step, float(step))
    saver.wait()
    messages = []
    if rank == 1:
        CheckpointWriter.seal, stock = fail, CheckpointWriter.seal
    begin(saver, output_dir, 4, 4.0)
    with pytest.raises(CheckpointError) as failed:
        saver.wait()
    messages.append(str(failed.value))
    if rank == 1:
        CheckpointWriter.seal = stock
    begin(saver, output_dir, 5, 5.0)
    saver.wait()
    return messages


def test_two_ranks_go_on_together_and_fail_together(tmp_path):
    first, second = (messages[0] for messages in run_ranks(two_ranks, 2, str(tmp_path)))
    assert second.startswith("cannot write")
    assert first == f"rank 1: {second}"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in (1, 2, 3, 5)]
    assert value_of(tmp_path / "checkpoint-5") == 5.0


def test_a_rank_that_never_finishes_is_given_up(tmp_path):
    saver = CheckpointSaver(Topology.single(), asynchronous=True, patience=0.2)
    writer = CheckpointWriter(tmp_path, 1, world_size=2, memory=saver.memory)
    saver.commit(writer, {}, lambda path: None)
    begun = time.monotonic()
    with pytest.raises(
        CheckpointError, match=r"ranks \[1\] did not finish their part of .* within 0 s: they have died"
    ):
        saver.wait()
    assert time.monotonic() - begun < 20
    assert find_latest(tmp_path).path is None


def test_a_rank_that_ends_alone_leaves_it_some_time(tmp_path, monkeypatch):
    go_on = slow_down(monkeypatch)
    saver = CheckpointSaver(Topology.single(), asynchronous=True)
    saver.let_finish(60)
    begin(saver, tmp_path, 3, 1.0)
    saver.let_finish(0.01)
    assert find_latest(tmp_path).path is None
    threading.Timer(0.2, go_on.set).start()
    saver.let_finish(60)
    assert value_of(tmp_path / "checkpoint-3") == 1.0


def test_a_process_does_not_stay_for_its_checkpoint(tmp_path):
    saver = CheckpointSaver(Topology.single(), asynchronous=True, patience=60)
    writer = CheckpointWriter(tmp_path, 1, world_size=2, memory=saver.memory)
    saver.commit(writer, {}, lambda path: None)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "checkpoint-1"]
    assert thread.daemon
    os.rename(writer.path, tmp_path / "gone")
    (tmp_path / "gone" / "state" / "done-1-of-2.json").write_text("[]")
    os.rename(tmp_path / "gone", writer.path)
    thread.join(20)
    assert not thread.is_alive()
