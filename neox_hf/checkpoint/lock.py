"""One trainer per output directory."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from neox_hf.errors import CheckpointError

LOCK_FILE = ".neox_hf.lock"


class OutputLock:
    """Holds an output directory for this process, by `flock` on a file in it.

    The kernel releases the lock when the process ends in any way. A forked child (a loader worker) closes its copy of
    the descriptor at once, so that a worker that outlives a killed trainer does not keep the directory; programs that
    are executed never inherit it.
    """

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self.output_dir = Path(output_dir)
        self._descriptor: int | None = None

    def acquire(self) -> "OutputLock":
        """Take the lock, creating the directory if need be.

        Raises:
            CheckpointError: another trainer holds it, or the directory cannot be written or locked.
        """
        path = self.output_dir / LOCK_FILE
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CheckpointError(f"cannot write into {self.output_dir}: {error}; choose another output_dir") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise CheckpointError(
                f"{self.output_dir} is in use by another trainer, {_holder(path)}; stop it or choose another output_dir"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise CheckpointError(
                f"the file system of {self.output_dir} cannot lock files: {error}; mount it with flock support"
            ) from error
        self._descriptor = descriptor
        # In a child, closing its copy of the descriptor leaves the parent's lock alone; unlocking it would not.
        os.register_at_fork(after_in_child=self.release)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        return self

    def release(self) -> None:
        """Give the directory free. The file stays: removing it would let two later trainers lock two files."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "OutputLock":
        return self.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"pid {holder['pid']} on {holder['host']} since {holder['since']}"
    except (json.JSONDecodeError, KeyError):
        return "which has not yet written its name"  # between its lock and its first write
