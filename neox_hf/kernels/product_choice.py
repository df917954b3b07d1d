"""Which algorithm computes a product on a device: the quickest of cuBLASLt's proposals (`measured_choice.py`).

torch takes what cuBLASLt estimates to be best; others of its proposals are often quicker, by up to a fifth, above all
where the sum is short, as in small models.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neox_hf.kernels.choice_file import ChoiceFile, Measured
from neox_hf.kernels.cublaslt import Algorithm, CublasLtError, Problem, Product, cublaslt, is_encoding
from neox_hf.kernels.launch_file import dtype_name
from neox_hf.kernels.measured_choice import MOST_PLANS, Compute, MeasuredChoices, NotNowError, coarse, quickest_of

logger = logging.getLogger(__name__)


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


class ProductChoices(MeasuredChoices):
    """The plans of one device, made by the first call of each problem.

    plans: how to compute a problem; None: by torch.
    """

    def __init__(self, library: Any, file: ChoiceFile) -> None:
        super().__init__(file)
        self._library = library
        self.plans: dict[Problem, Plan | None] = {}

    def make_plan(self, problem: Problem, operands: Callable[[], Operands]) -> Plan | None:
        """The plan of a problem that has none yet. operands: of this call."""
        with self._lock:
            try:
                plan = self._plan(problem, operands)
            except NotNowError:
                return None  # and ask again next time
            except (CublasLtError, torch.OutOfMemoryError) as error:
                logger.info("product %s is left to torch: %s", kind_of(problem), error)
                plan = None
            if len(self.plans) >= MOST_PLANS:
                self.plans.clear()
            self.plans[problem] = plan
            return plan

    def _plan(self, problem: Problem, operands: Callable[[], Operands]) -> Plan | None:
        product = Product(self._library, problem)
        text = self.of_kind(kind_of(problem), lambda: self._measure(problem, product, operands())).algorithm
        algorithm = None if text is None else product.restored(text)
        return None if algorithm is None else Plan(product, algorithm)

    def _measure(self, problem: Problem, product: Product, operands: Operands) -> Measured:
        found = measure(product, operands)
        logger.info("product %s: %.4f ms, by torch %.4f", kind_of(problem), found.ms, found.plain_ms)
        return found


@functools.cache
def choices_on(device: torch.device) -> ProductChoices | None:
    """Those of `device`, whose file is read now; None where there is no cuBLASLt. `cache_clear()` forgets all."""
    library = cublaslt() if device.type == "cuda" else None
    if library is None:
        return None
    device_name, version = torch.cuda.get_device_name(device), str(library.cublasLtGetVersion())
    return ProductChoices(library, ChoiceFile.of("products", device_name, "cublaslt", version, is_encoding))


def kind_of(problem: Problem) -> str:
    """What problems have in common that share a choice, as a file names it."""
    sizes = "x".join(str(coarse(size)) for size in (problem.rows, problem.inner, problem.columns))
    orders = " ".join("column" if matrix.transposed else "row" for matrix in (problem.a, problem.b))
    bias = " + bias" if problem.biased else ""
    aligned = "" if problem.alignment == 256 else f", aligned to {problem.alignment}"
    return f"{dtype_name(problem.dtype)} {sizes} {orders} -> {dtype_name(problem.out_dtype)}{bias}{aligned}"


def measure(product: Product, operands: Operands) -> Measured:
    """The quickest of all proposals, if it beats torch. `operands.out` holds the product afterwards."""
    out, a, b, bias, by_torch = operands
    computes: dict[str | None, Compute] = {None: by_torch}
    for algorithm in product.proposals():
        compute = functools.partial(product.run, algorithm, out, a, b, bias)
        try:
            compute()
        except CublasLtError:
            continue
        computes[algorithm.text] = compute
    return quickest_of(computes)
