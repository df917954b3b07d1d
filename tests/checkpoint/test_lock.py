"""One trainer per output directory, whatever ends it."""

import os
import signal
import subprocess
import sys

import pytest

from neox_hf.checkpoint import OutputLock
from neox_hf.checkpoint.lock import LOCK_FILE
from neox_hf.errors import CheckpointError

# Loads the one module alone: the lock needs neither torch nor transformers.
HOLDER = """
import importlib.util, os, sys, time, types
package = types.ModuleType("neox_hf"); package.__path__ = [sys.argv[2]]; sys.modules["neox_hf"] = package
spec = importlib.util.spec_from_file_location("lock", os.path.join(sys.argv[2], "checkpoint", "lock.py"))
lock = importlib.util.module_from_spec(spec); spec.loader.exec_module(lock)
held = lock.OutputLock(sys.argv[1]).acquire()
if os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_a_second_lock_is_refused_with_the_holder_named(tmp_path):
    with (
        OutputLock(tmp_path),
        pytest.raises(CheckpointError, match=rf"in use by another trainer, pid {os.getpid()} on .* since 2"),
    ):
        OutputLock(tmp_path).acquire()


def test_a_released_directory_can_be_locked_again(tmp_path):
    with OutputLock(tmp_path / "new" / "run"):
        pass
    first = OutputLock(tmp_path / "new" / "run").acquire()
    first.release()
    first.release()
    with OutputLock(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run" / LOCK_FILE).exists()


def test_two_directories_are_independent(tmp_path):
    with OutputLock(tmp_path / "a"), OutputLock(tmp_path / "b"):
        pass


def test_a_lock_dies_with_its_process_though_a_forked_worker_lives_on(tmp_path):
    package = os.path.dirname(os.path.dirname(sys.modules[OutputLock.__module__].__file__))
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path, package], stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(CheckpointError, match=f"pid {holder.pid}"):
            OutputLock(tmp_path).acquire()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(worker, 0)  # still there
        with OutputLock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_the_lock_survives_the_end_of_a_forked_worker(tmp_path):
    with OutputLock(tmp_path):
        worker = os.fork()
        if worker == 0:
            os._exit(0)
        os.waitpid(worker, 0)
        with pytest.raises(CheckpointError, match="in use by another trainer"):
            OutputLock(tmp_path).acquire()


def test_a_holder_that_has_not_written_its_name_yet(tmp_path):
    with OutputLock(tmp_path):
        (tmp_path / LOCK_FILE).write_text("")
        with pytest.raises(CheckpointError, match="which has not yet written its name"):
            OutputLock(tmp_path).acquire()


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write into .*file/run.*choose another output_dir"):
        OutputLock(tmp_path / "file" / "run").acquire()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(CheckpointError, match=r"cannot lock files.*mount it with flock support"):
        OutputLock(tmp_path).acquire()
