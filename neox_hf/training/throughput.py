"""How fast the run is: tokens/s, TFLOP/s, MFU and memory between two log lines.

TFLOP/s per device = tokens/s per device x FLOPs per token; the formula is `modeling.accounting.flops_per_token`
(attention counted full, recomputation never). MFU is against `peak_tflops` where the user gives one, else against the
matrix-product rate this device sustains, measured at start.
"""

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

MEASURE_SECONDS = 0.5
CUDA_SIZE, CPU_SIZE = 8192, 1024


def number_of_tokens(batch: Mapping[str, Tensor]) -> int:
    """Those of a batch's input_ids [B, S], or inputs_embeds [B, S, H]; padding counts."""
    ids = batch.get("input_ids")
    return batch["inputs_embeds"].shape[:2].numel() if ids is None else ids.numel()


def sustained_matmul_tflops(device: torch.device, dtype: torch.dtype, seconds: float = MEASURE_SECONDS) -> float:
    """Rate of a large square matrix product on `device`, in TFLOP/s, over about `seconds` after a warm-up."""
    size = CUDA_SIZE if device.type == "cuda" else CPU_SIZE
    # A generator of its own: the run's random numbers must not depend on whether something was measured.
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    out = torch.empty_like(left)
    for _ in range(3):
        torch.mm(left, right, out=out)
    _synchronise(device)
    begin, products = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begin) < seconds:
        for _ in range(4):
            torch.mm(left, right, out=out)
        products += 4
        _synchronise(device)
    return 2 * size**3 * products / elapsed / 1e12


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Throughput:
    """A stopwatch over training steps. Evaluation and saving are not training: they pause it.

    Args:
        flops_per_token: forward and backward of one token.
        peak_tflops: what 100 % MFU is.
        device: whose memory is reported.
    """

    def __init__(self, flops_per_token: float, peak_tflops: float, device: torch.device) -> None:
        self.flops_per_token = flops_per_token
        self.peak_tflops = peak_tflops
        self.device = device
        self._tokens = 0
        self._seconds = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Go on, unless it is running already."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not training."""
        running = self._since is not None
        self.pause()
        try:
            yield
        finally:
            if running:
                self.start()

    def count(self, tokens: int) -> None:
        """Add the tokens of one micro-batch of this device."""
        self._tokens += tokens

    def read(self, devices: int) -> dict[str, float]:
        """Figures since the last reading; `tokens_per_second` is of all `devices`, TFLOP/s and memory of one."""
        with self.paused():
            per_second = self._tokens / self._seconds if self._seconds else 0.0
            self._tokens, self._seconds = 0, 0.0
        tflops = per_second * self.flops_per_token / 1e12
        return {
            "tokens_per_second": round(per_second * devices),
            "tflops_per_device": round(tflops, 4),
            "mfu": round(tflops / self.peak_tflops, 4),
            "memory_gib": round(self._memory_gib(), 3),
        }

    def _memory_gib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
