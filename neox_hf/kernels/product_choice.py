"""Which algorithm computes a product on a device: found by measuring, once, and remembered on disk.

torch takes what cuBLASLt estimates to be best; others of its proposals are often quicker, by up to a fifth, above all
where the sum is short, as in small models. What counts is their time in training, when the card is limited by its
power: the clock of each is then what its energy leaves it, and one that takes fewer cycles but more energy loses. So
the first time that a kind of product comes up, all proposals are timed briefly on its operands, and those in front once
more, each long enough by itself that the clock settles. That takes about a second. Later runs on a device of that name
read what was found: they choose alike.
"""

import functools
import logging
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neox_hf.kernels.cublaslt import Algorithm, CublasLtError, Problem, Product, cublaslt
from neox_hf.kernels.launch_file import dtype_name
from neox_hf.kernels.product_file import Measured, ProductFile

logger = logging.getLogger(__name__)

MARGIN = 0.01
"""By how much an algorithm must be quicker than torch's: less, and chance would choose."""

QUICK_ROUNDS, QUICK_CALLS = 5, 2
"""Turns, and calls in each, by which the finalists are found. The median counts, since clocks drift."""

FINALISTS = 4
"""Beside torch's product. The one that wins at the clock it is left has been up to 4 % behind in cycles."""

STEADY_ROUNDS, STEADY_MS = 3, 35.0
"""Turns of a finalist; it runs for so long untimed, in which the clock settles, and for as long timed."""

SECONDS_AT_ONCE, SHARE_OF_TIME = 60.0, 0.02
"""What a run spends on measuring: a minute, enough for every product of a model at one batch size, and then so much of
its time. Batches of ever other lengths would else be measured for longer than their products gain."""

KEPT_BITS = 4
"""Sizes of one kind agree in so many leading bits: batches of many lengths are not measured one by one."""

MOST_PLANS = 4096

Compute = Callable[[], object]


class Plan(NamedTuple):
    """A product of which it is known how it is computed."""

    product: Product
    algorithm: Algorithm

    def run(self, out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, keep: bool) -> None:
        self.product.run(self.algorithm, out, a, b, bias, keep=keep)


class Operands(NamedTuple):
    """What a problem is measured on. by_torch: computes it into `out`, of which the contents are of no account."""

    out: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None
    by_torch: Compute


class ProductChoices:
    """The plans of one device, made by the first call of each problem, which may come from a thread of autograd's.

    measured: what is known, by kind of product. plans: how to compute a problem; None: by torch.
    """

    def __init__(self, library: Any, file: ProductFile) -> None:
        self._library, self.file = library, file
        self.measured = file.read()
        self._lock = threading.Lock()
        self._begin, self._spent = time.monotonic(), 0.0
        self.plans: dict[Problem, Plan | None] = {}

    def make_plan(self, problem: Problem, operands: Callable[[], Operands]) -> Plan | None:
        """The plan of a problem that has none yet. operands: of this call."""
        with self._lock:
            try:
                plan = self._plan(problem, operands)
            except _NotNowError:
                return None  # and ask again next time
            except (CublasLtError, torch.OutOfMemoryError) as error:
                logger.info("product %s is left to torch: %s", kind_of(problem), error)
                plan = None
            if len(self.plans) >= MOST_PLANS:
                self.plans.clear()
            self.plans[problem] = plan
            return plan

    def _plan(self, problem: Problem, operands: Callable[[], Operands]) -> Plan | None:
        kind = kind_of(problem)
        if kind not in self.measured and not self._may_measure():
            raise _NotNowError
        product = Product(self._library, problem)
        if kind not in self.measured:
            self.measured[kind] = self.file.agree(kind, self._measure(kind, product, operands()))
        text = self.measured[kind].algorithm
        algorithm = None if text is None else product.restored(text)
        return None if algorithm is None else Plan(product, algorithm)

    def _may_measure(self) -> bool:
        now = time.monotonic()
        within = self._spent <= SECONDS_AT_ONCE + SHARE_OF_TIME * (now - self._begin)
        return within and not torch.cuda.is_current_stream_capturing()

    def _measure(self, kind: str, product: Product, operands: Operands) -> Measured:
        begin = time.monotonic()
        found = measure(product, operands)
        self._spent += time.monotonic() - begin
        logger.info("product %s: %.4f ms, by torch %.4f", kind, found.ms, found.torch_ms)
        return found


class _NotNowError(Exception):
    """A CUDA graph is captured, or measuring has taken its share of the time."""


@functools.cache
def choices_on(device: torch.device) -> ProductChoices | None:
    """Those of `device`, whose file is read now; None where there is no cuBLASLt. `cache_clear()` forgets all."""
    library = cublaslt() if device.type == "cuda" else None
    if library is None:
        return None
    version = library.cublasLtGetVersion()
    return ProductChoices(library, ProductFile.of(torch.cuda.get_device_name(device), version))


def kind_of(problem: Problem) -> str:
    """What problems have in common that share a choice, as a file names it."""
    sizes = "x".join(str(coarse(size)) for size in (problem.rows, problem.inner, problem.columns))
    orders = " ".join("column" if matrix.transposed else "row" for matrix in (problem.a, problem.b))
    bias = " + bias" if problem.biased else ""
    aligned = "" if problem.alignment == 256 else f", aligned to {problem.alignment}"
    return f"{dtype_name(problem.dtype)} {sizes} {orders} -> {dtype_name(problem.out_dtype)}{bias}{aligned}"


def coarse(size: int) -> int:
    """`size`, rounded up to KEPT_BITS leading bits."""
    shift = max(size.bit_length() - KEPT_BITS, 0)
    return -(-size >> shift) << shift


def measure(product: Product, operands: Operands) -> Measured:
    """The quickest of all proposals, if it beats torch by the margin. `operands.out` holds the product afterwards."""
    out, a, b, bias, by_torch = operands
    computes: dict[str | None, Compute] = {None: by_torch}
    for algorithm in product.proposals():
        compute = functools.partial(product.run, algorithm, out, a, b, bias)
        try:
            compute()
        except CublasLtError:
            continue
        computes[algorithm.text] = compute
    quick = medians(computes, QUICK_ROUNDS, dict.fromkeys(computes, QUICK_CALLS))
    final = finalists(quick)
    ms = medians(
        {text: computes[text] for text in final}, STEADY_ROUNDS, {text: steady_calls(quick[text]) for text in final}
    )
    quickest = min(ms, key=ms.__getitem__)
    chosen = quickest if ms[quickest] < (1 - MARGIN) * ms[None] else None
    return Measured(chosen, ms[None], ms[chosen])


def finalists(ms: Mapping[str | None, float]) -> list[str | None]:
    """torch's, and the first few of all others."""
    others = sorted((text for text in ms if text is not None), key=ms.__getitem__)
    return [None, *others[:FINALISTS]]


def steady_calls(ms: float) -> int:
    return max(1, round(STEADY_MS / ms))


def medians(
    computes: Mapping[str | None, Compute], rounds: int, calls: Mapping[str | None, int]
) -> dict[str | None, float]:
    """ms of each, in `rounds` turns of `calls` untimed and as many timed. The device works through all of them without
    a pause: the host waits for it at their end alone."""
    laps: dict[str | None, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {text: [] for text in computes}
    for turn in range(rounds):
        for text in list(computes)[:: 1 if turn % 2 == 0 else -1]:
            _repeat(computes[text], calls[text])
            begin = _event()
            _repeat(computes[text], calls[text])
            laps[text].append((begin, _event()))
    torch.cuda.current_stream().synchronize()
    return {
        text: statistics.median(begin.elapsed_time(end) for begin, end in found) / calls[text]
        for text, found in laps.items()
    }


def _repeat(compute: Compute, times: int) -> None:
    for _ in range(times):
        compute()


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
