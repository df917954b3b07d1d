"""A polite stop: SIGTERM or SIGUSR1 makes every rank save at the same step.

A signal may reach one rank, or each at another moment. So it only sets a flag; after each step the ranks agree, by
the maximum of their flags over a host-side group, and all of them see the stop at the same step. Survivors of a dead
peer get a SIGTERM from the launcher too: their agreement fails with the peer, so they never try to save without it.

`accelerate launch` of a single process dies of a SIGTERM without passing it on. Its child then takes the death of the
launcher for the signal.

Python lets only the main thread listen to signals. A run in another thread stops at another rank's, or not at all.
"""

import logging
import os
import signal
import threading
from types import FrameType

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def launched_without_agent() -> bool:
    """Whether the parent is `accelerate launch` itself, and not torch's elastic agent, which forwards signals."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ


class StopRequest:
    """Holds the stop signal this process has received, and the agreement of all ranks on it. A context manager.

    Args:
        world_size: ranks that must agree. With more than one, a process group must exist.
    """

    def __init__(self, world_size: int) -> None:
        self.received = 0
        self.agreed = 0
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._previous: dict[int, object] = {}
        self._launcher = os.getppid() if launched_without_agent() else None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "training runs in the thread %s, and only the main thread hears signals: SIGTERM and SIGUSR1 will not "
                "save a checkpoint",
                threading.current_thread().name,
            )
            return self
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = max(self.received, number)

    def agree(self) -> int:
        """The signal on which all ranks stop after this step, or 0. Every rank must call this once a step."""
        if self._launcher is not None and os.getppid() != self._launcher:
            self.received = self.received or signal.SIGTERM
        if self._group is None:
            self.agreed = self.received
        else:
            flag = torch.tensor(self.received)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
            self.agreed = int(flag)
        return self.agreed
