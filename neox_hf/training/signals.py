"""A polite stop: SIGTERM or SIGUSR1 makes every rank save at the same step.

A signal may reach one rank, or each at another moment. So it only sets a flag; after each step the ranks agree, by
the maximum of their flags over a host-side group, and all of them see the stop at the same step. Survivors of a dead
peer get a SIGTERM from the launcher too: their agreement fails with the peer, so they never try to save without it.
"""

import signal
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


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

    def __enter__(self) -> "StopRequest":
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
        if self._group is None:
            self.agreed = self.received
        else:
            flag = torch.tensor(self.received)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
            self.agreed = int(flag)
        return self.agreed
