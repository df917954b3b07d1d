"""What `save_total_limit` deletes, and what it never does."""

import os

import pytest

from neox_hf.checkpoint import find_latest, prune
from neox_hf.checkpoint.directory import step_of


@pytest.fixture
def run(write_small, tmp_path):
    """Checkpoints 1, 2, 4, 8 of a schedule and 5, 6, 7 between them."""
    for step in (1, 2, 4, 5, 6, 7, 8):
        write_small(tmp_path, step)
    return tmp_path


def steps_left(output_dir) -> list[int]:
    return sorted(step_of(path) for path in output_dir.iterdir())


@pytest.mark.parametrize(
    ("keep", "protected", "best", "left"),
    [
        (3, (), None, [6, 7, 8]),
        (3, (), 2, [2, 7, 8]),
        (3, (), 7, [6, 7, 8]),
        (1, (), None, [8]),
        (1, (), 8, [8]),
        (1, (), 5, [5, 8]),
        (2, (1, 2, 4, 8), None, [1, 2, 4, 6, 7, 8]),
        (2, (1, 2, 4, 8), 5, [1, 2, 4, 5, 7, 8]),
        (2, (1, 2, 4, 8), 4, [1, 2, 4, 6, 7, 8]),
        (9, (), None, [1, 2, 4, 5, 6, 7, 8]),
        (0, (), None, [1, 2, 4, 5, 6, 7, 8]),
        (-1, (), None, [1, 2, 4, 5, 6, 7, 8]),
        (1, (1, 2, 4, 5, 6, 7, 8), None, [1, 2, 4, 5, 6, 7, 8]),
    ],
)
def test_what_is_left(run, keep, protected, best, left):
    before = steps_left(run)
    deleted = prune(run, keep, lambda step: step in protected, run / f"checkpoint-{best}" if best else None)
    assert steps_left(run) == left
    assert [step_of(path) for path in deleted] == sorted(set(before) - set(left))


def test_what_is_no_checkpoint_is_neither_counted_nor_deleted(run, caplog):
    (run / "checkpoint-9").mkdir()
    (run / "checkpoint-7" / "manifest.json").unlink()
    (run / "tmp-checkpoint-10").mkdir()
    prune(run, 1, lambda step: False, None)
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoint-7",
        "checkpoint-8",
        "checkpoint-9",
        "tmp-checkpoint-10",
    ]
    assert find_latest(run).path == run / "checkpoint-8"
    assert "left alone" in caplog.text


def test_a_deletion_that_was_cut_short_leaves_no_half_checkpoint(run, monkeypatch):
    def dies(path):
        os.unlink(path / "manifest.json")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            prune(run, 6, lambda step: False, None)
    assert not (run / "checkpoint-1").exists()
    assert find_latest(run).passed_over == []


def test_an_empty_directory(tmp_path):
    assert prune(tmp_path / "none", 1, lambda step: False, None) == []
