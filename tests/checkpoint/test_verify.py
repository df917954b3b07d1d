"""Damage of every kind is named; the newest checkpoint without any is found."""

import shutil
from pathlib import Path

import pytest

from neox_hf.checkpoint import FileRecord, Manifest, find_latest, open_checkpoint, read_manifest, verify_checkpoint
from neox_hf.checkpoint.verify import is_safe
from neox_hf.errors import CheckpointError


@pytest.fixture
def checkpoint(small_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(small_checkpoint, tmp_path / "run" / "checkpoint-3"))


def files_of(path: Path) -> list[str]:
    return sorted(record.path for record in read_manifest(path).files)


def test_a_whole_checkpoint_is_valid(checkpoint):
    manifest = verify_checkpoint(checkpoint)
    assert (manifest.step, manifest.world_size, manifest.metadata) == (3, 1, {"consumed_samples": 24})
    assert {"python", "neox_hf", "torch", "transformers", "safetensors", "numpy"} <= set(manifest.versions)
    assert set(files_of(checkpoint)) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "state/optimizer.exp_avg-0-of-1.safetensors",
        "state/rng-0-of-1.safetensors",
        "trainer_state.json",
    }


def test_one_flipped_bit_is_named_in_every_file(checkpoint):
    for name in [*files_of(checkpoint), "manifest.json"]:
        file = checkpoint / name
        whole = file.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            file.write_bytes(bytes([*whole[:place], whole[place] ^ 4, *whole[place + 1 :]]))
            with pytest.raises(CheckpointError, match=rf"{name} is damaged"):
                open_checkpoint(checkpoint)
        file.write_bytes(whole)
    verify_checkpoint(checkpoint)


def test_a_truncated_file_is_named(checkpoint):
    for name in files_of(checkpoint):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[:-1])
        message = rf"{name} has {len(whole) - 1} bytes, it was written with {len(whole)}"
        with pytest.raises(CheckpointError, match=message):
            verify_checkpoint(checkpoint)
        (checkpoint / name).write_bytes(whole)


def test_a_missing_file_is_named(checkpoint):
    for name in files_of(checkpoint):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            verify_checkpoint(checkpoint)
        (checkpoint / name).write_bytes(whole)


def test_without_a_manifest_it_is_no_checkpoint(checkpoint):
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest.json is missing: .*checkpoint-3 is not a finished checkpoint"):
        verify_checkpoint(checkpoint)


def test_an_empty_manifest_is_named(checkpoint):
    (checkpoint / "manifest.json").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged: 0 bytes that are not JSON"):
        verify_checkpoint(checkpoint)


def test_a_manifest_that_cannot_be_read(checkpoint):
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest.json cannot be read"):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/passwd", "state/../../outside", "", ".", "a//b", "./a", "a\\b", "a/", "..", "a\0b"]
)
def test_a_path_out_of_the_directory_is_refused(tmp_path, path):
    assert not is_safe(path)
    manifest = Manifest(step=1, world_size=1, files=(FileRecord(path, 1, "0"),))
    (tmp_path / "manifest.json").write_bytes(manifest.to_bytes())
    with pytest.raises(CheckpointError, match="which is not a path inside the checkpoint"):
        verify_checkpoint(tmp_path)


@pytest.mark.parametrize("path", ["a", "state/a.json", "..a", "a b/c.d"])
def test_a_path_inside_the_directory_is_taken(path):
    assert is_safe(path)


def test_links_are_refused(checkpoint, tmp_path):
    weights = checkpoint / "model.safetensors"
    outside = tmp_path / "outside"
    shutil.move(weights, outside)
    weights.symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"model.safetensors is a symbolic link to .*outside"):
        verify_checkpoint(checkpoint)


def test_a_linked_folder_is_refused(checkpoint, tmp_path):
    shutil.move(checkpoint / "state", tmp_path / "elsewhere")
    (checkpoint / "state").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"state is a symbolic link to .*elsewhere"):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["training_args.bin", "state/optimizer.pt", "pytorch_model.bin", "x.pkl", "x.ckpt"])
def test_pickles_are_refused(checkpoint, name):
    (checkpoint / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    with pytest.raises(CheckpointError, match=f"{name} may be a pickle"):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"])
def test_weights_that_the_manifest_does_not_know_are_refused(checkpoint, name):
    (checkpoint / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=f"{name} is not in the manifest"):
        verify_checkpoint(checkpoint)


def test_a_note_of_the_user_is_no_damage(checkpoint):
    (checkpoint / "notes.txt").write_text("the good one")
    verify_checkpoint(checkpoint)


def test_a_folder_that_cannot_be_read(checkpoint, monkeypatch):
    def walk(root, onerror):
        onerror(PermissionError(13, "Permission denied", str(root / "state")))

    monkeypatch.setattr("os.walk", walk)
    with pytest.raises(CheckpointError, match=r"cannot read .*state: .*Permission denied"):
        verify_checkpoint(checkpoint)


def test_the_newest_valid_one_is_found_and_the_others_are_reported(write_small, tmp_path, caplog):
    for step in (2, 10, 9):
        write_small(tmp_path, step)
    (tmp_path / "checkpoint-10" / "manifest.json").unlink()
    (tmp_path / "tmp-checkpoint-11").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    found = find_latest(tmp_path)
    assert found.path == tmp_path / "checkpoint-9"
    assert found.manifest.step == 9
    ((path, reason),) = found.passed_over
    assert path == tmp_path / "checkpoint-10"
    assert "manifest.json is missing" in reason
    assert "passed over" in caplog.text


def test_nothing_is_found_where_there_is_nothing(tmp_path):
    assert find_latest(tmp_path / "none").path is None
    (tmp_path / "checkpoint-1").mkdir()
    found = find_latest(tmp_path)
    assert found.path is None
    assert len(found.passed_over) == 1
