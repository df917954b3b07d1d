"""Milliseconds of a CUDA device for one call, without what the host needs to launch it."""

import time
from collections.abc import Sequence

import torch

from neox_hf.tuning.inputs import Random
from neox_hf.tuning.work import Call, Work

L2_TIMES = 3
"""Inputs of all calls together, in sizes of the second-level cache: none finds there what it reads."""

MOST_INPUTS = 16
CALLS = 16
"""Fewest calls of a round: a few ms, thousands of times what the events can tell apart."""

CYCLES_PER_SECOND = 2e9


class DeviceClock:
    """Prepares calls on a device and times them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def first_call(self, work: Work) -> Call:
        """A call over fresh inputs, the same ones each time."""
        return work.prepare(Random(self.device))

    def calls(self, work: Work) -> list[Call]:
        """Calls over as many inputs as the second-level cache does not hold."""
        enough = L2_TIMES * torch.cuda.get_device_properties(self.device).L2_cache_size
        before = torch.cuda.memory_allocated(self.device)
        made = [work.prepare(Random(self.device))]
        while torch.cuda.memory_allocated(self.device) - before < enough and len(made) < MOST_INPUTS:
            made.append(work.prepare(Random(self.device, seed=len(made))))
        return made

    def ms(self, calls: Sequence[Call]) -> float:
        """Of one call, in the mean of a round.

        The device waits until the host has launched all of them: then they follow one another without gaps.
        """
        round_of_calls = list(calls) * -(-CALLS // len(calls))
        torch.cuda.synchronize(self.device)
        begun = time.perf_counter()
        round_of_calls[0]()  # compiles, the first time
        host_seconds = time.perf_counter() - begun
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(CYCLES_PER_SECOND * min(2 * host_seconds * len(round_of_calls), 0.1)))
        begin.record()
        for call in round_of_calls:
            call()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / len(round_of_calls)
