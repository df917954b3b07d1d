"""Full disks and directories that cannot be written: said clearly, and earlier checkpoints stay."""

import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from neox_hf.checkpoint import Box, CheckpointWriter, OutputLock, find_latest, verify_checkpoint, write_final
from neox_hf.errors import CheckpointError
from tests.checkpoint.conftest import build


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """No file of this process can grow over `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITES = {
    "weights": lambda writer: writer.write_weights(build("stock")),
    "boxes": lambda writer: writer.write_boxes("x", [Box.whole("w", torch.zeros(4096))]),
    "json": lambda writer: writer.write_json("x.json", list(range(4096))),
    "tensors": lambda writer: writer.write_tensors("x", {"w": torch.zeros(4096)}, {}),
}


@pytest.mark.parametrize("part", WRITES)
def test_a_full_disk(write_small, tmp_path, part):
    write_small(tmp_path, 1)
    writer = CheckpointWriter(tmp_path, 2)
    with (
        files_at_most(2000),
        pytest.raises(CheckpointError, match=r"cannot write .*tmp-checkpoint-2.*File too large.* Earlier .* untouched"),
    ):
        WRITES[part](writer)
    assert find_latest(tmp_path).path == tmp_path / "checkpoint-1"
    write_small(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_a_disk_that_is_full_when_the_manifest_is_written(write_small, tmp_path):
    write_small(tmp_path, 1)
    writer = CheckpointWriter(tmp_path, 2)
    writer.write_json("x.json", 0)
    with files_at_most(200), pytest.raises(CheckpointError, match=r"cannot write .*checkpoint-2: .*File too large"):
        writer.commit()
    assert find_latest(tmp_path).passed_over == []
    assert find_latest(tmp_path).path == tmp_path / "checkpoint-1"


@pytest.fixture
def output_dir(write_small) -> Iterator[Path]:
    """An output directory with one checkpoint, which every user of the machine can reach."""
    with tempfile.TemporaryDirectory() as name:
        write_small(Path(name), 1)
        Path(name).chmod(0o755)
        yield Path(name)


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Permissions count for nothing with root: take another user's rights for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_read_only_directory(output_dir):
    output_dir.chmod(0o555)
    with ordinary_user():
        with pytest.raises(CheckpointError, match=r"cannot write .*tmp-checkpoint-2: .*Permission denied"):
            CheckpointWriter(output_dir, 2)
        with pytest.raises(CheckpointError, match=r"cannot write into .*Permission denied.*choose another output_dir"):
            OutputLock(output_dir).acquire()
        assert find_latest(output_dir).path == output_dir / "checkpoint-1"


def test_a_file_that_may_not_be_read(output_dir):
    (output_dir / "checkpoint-1" / "state" / "data.json").chmod(0)
    with ordinary_user(), pytest.raises(CheckpointError, match=r"cannot read .*data\.json: .*Permission denied"):
        verify_checkpoint(output_dir / "checkpoint-1")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o007, 0o660)])
def test_files_are_as_readable_as_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        writer = CheckpointWriter(tmp_path, 1)
        writer.write_weights(build("stock"))
        writer.write_boxes("x", [Box.whole("w", torch.zeros(2))])
        writer.commit()
        write_final(build("stock"), None, tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {mode}
