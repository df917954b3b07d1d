"""The queue on disk: complete or absent, in order, and independent of the checkpoints it was filled from."""

import fcntl
import os
import shutil

import pytest

from neox_hf.checkpoint.hub.queue import Destination, PushQueue
from neox_hf.errors import CheckpointError

WHERE = Destination("tester/tiny", False, "title")


def read(entry) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in entry.files}


def test_entries_keep_their_order_beyond_ten_and_survive_the_checkpoint(checkpoint, tmp_path):
    queue = PushQueue(tmp_path)
    for step in range(1, 13):
        folder = checkpoint(step)
        queue.add(f"step{step}", folder, WHERE)
        shutil.rmtree(folder)
    entries = PushQueue(tmp_path).entries()  # another process
    assert [entry.revision for entry in entries] == [f"step{step}" for step in range(1, 13)]
    assert b'"step": 12' in read(entries[-1])["config.json"]
    assert entries[0].destination() == WHERE


def test_weights_are_links_and_keep_the_old_bytes_when_the_final_model_is_replaced(checkpoint, tmp_path):
    folder = checkpoint(1)
    entry = PushQueue(tmp_path).add("main", folder, WHERE)
    before = read(entry)
    weights = next(path for path in entry.files if path.name == "model.safetensors")
    assert weights.stat().st_ino == (folder / "model.safetensors").stat().st_ino
    (folder / "new").write_bytes(b"another final model")
    (folder / "new").replace(folder / "model.safetensors")
    (folder / "config.json").write_text("rewritten in place")
    assert read(entry) == before


def test_weights_are_copied_where_links_are_impossible(checkpoint, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    folder = checkpoint(1)
    entry = PushQueue(tmp_path).add("step1", folder, WHERE)
    assert read(entry)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_revision_queued_again_counts_once_with_its_newest_bytes(checkpoint, tmp_path):
    queue = PushQueue(tmp_path)
    queue.add("step1", checkpoint(1), WHERE)
    queue.add("step2", checkpoint(2), WHERE)
    newer = queue.add("step1", checkpoint(3), WHERE)
    assert [entry.revision for entry in queue.entries()] == ["step2", "step1"]
    assert b'"step": 3' in read(newer)["config.json"]
    queue.remove(newer)
    assert [entry.name for entry in queue.entries()] == ["000002-step2"]


def test_removing_an_entry_spares_a_newer_one_of_its_revision(checkpoint, tmp_path):
    """A checkpoint written again while its first version is being uploaded must go up afterwards."""
    queue = PushQueue(tmp_path)
    older = queue.add("step1", checkpoint(1), WHERE)
    newer = queue.add("step1", checkpoint(2), WHERE)
    queue.remove(older)
    assert queue.entries() == [newer]


def test_what_an_interruption_left_is_not_an_entry_and_is_cleared(checkpoint, tmp_path):
    queue = PushQueue(tmp_path)
    half_added = queue.path / "adding-000001-step9"
    half_removed = queue.path / "removing-000001-step9"
    for folder in (half_added, half_removed):
        (folder / "files").mkdir(parents=True)
    assert queue.entries() == []
    queue.remove(queue.add("step1", checkpoint(1), WHERE))
    assert not half_added.exists()
    assert not half_removed.exists()


def test_a_process_forked_while_the_lock_is_held_does_not_keep_it(tmp_path):
    """Data loader workers are forked while a push is under way and live as long as the run."""
    queue = PushQueue(tmp_path)
    end, child_end = os.pipe()
    with queue.lock():
        child = os.fork()
        if child == 0:
            os.close(child_end)
            os.read(end, 1)  # until the parent closes its end
            os._exit(0)
    with (queue.path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises BlockingIOError where somebody holds it
    os.close(child_end)
    os.close(end)
    assert os.waitpid(child, 0)[1] == 0


def test_a_stranger_in_the_folder_is_not_an_entry(tmp_path):
    queue = PushQueue(tmp_path)
    (queue.path / "2026").mkdir(parents=True)
    assert queue.entries() == []


def test_without_weights_there_is_nothing_to_publish(checkpoint, tmp_path):
    folder = checkpoint(1)
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"holds no \*\.safetensors file, so there is no model to publish as step1"
    ):
        PushQueue(tmp_path).add("step1", folder, WHERE)


def test_a_text_that_is_not_on_the_allow_list_is_refused(checkpoint, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"\.env may not be published; allowed are config, weights, tokenizer, card"
    ):
        PushQueue(tmp_path).add("step1", checkpoint(1), WHERE, {".env": "HF_TOKEN=", "README.md": "# card"})


def test_an_unreadable_ledger_names_the_folder_to_delete(checkpoint, tmp_path):
    entry = PushQueue(tmp_path).add("step1", checkpoint(1), WHERE)
    (entry.path / "ledger.json").write_text('{"repo": 1}')
    with pytest.raises(CheckpointError, match=r"ledger\.json cannot be read .*; delete the folder .*000001-step1"):
        entry.destination()
