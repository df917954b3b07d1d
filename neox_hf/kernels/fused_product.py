"""Products whose kernel goes on with what comes next, before it writes anything: where quack is installed, and quicker.

quack-kernels, which FlashAttention 4 brings along, has products for Hopper whose last step may be given as a function
of each element, and which overlap that step of one tile with the sums of the next. What is saved is a pass over the
result. It does not always pay: the step may take longer than the sums, and cuBLAS's algorithms may be quicker than
quack's. So both ways are timed on the device (`measured_choice.py`), and their results compared, when a kind of product
comes up for the first time. A tile takes some seconds to compile, once a machine: quack keeps what it has compiled.

Source: https://github.com/Dao-AILab/quack, `quack/epilogue`.
"""

import functools
import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neox_hf.kernels.choice_file import ChoiceFile, Measured
from neox_hf.kernels.launch_file import dtype_name
from neox_hf.kernels.measured_choice import (
    MOST_PLANS,
    Compute,
    MeasuredChoices,
    NotNowError,
    coarse,
    quickest_of,
)
from neox_hf.kernels.product import LEAST_ALIGNMENT

logger = logging.getLogger(__name__)

CHECKED_QUACK = ("0.6.5",)
"""Versions of quack-kernels whose epilogues were tried; their interface changes from one to the next."""

HOPPER = (9, 0)

FAR_APART = 0.03
"""From what the two ways compute, relative: ten times what roundings to half precision make of it."""


class Tile(NamedTuple):
    """How quack divides a product. cluster: thread blocks that share what they read, by rows and columns."""

    rows: int
    columns: int
    cluster: tuple[int, int]

    @property
    def text(self) -> str:
        return f"{self.rows}x{self.columns} {self.cluster[0]}x{self.cluster[1]}"

    @property
    def arguments(self) -> dict[str, Any]:
        """quack's. Two groups of warps take turns, each with a tile of its own: one sums while the other goes on."""
        sizes = {"tile_M": self.rows, "tile_N": self.columns, "pingpong": True}
        return sizes | {"cluster_M": self.cluster[0], "cluster_N": self.cluster[1]}


TILES = {
    tile.text: tile
    for tile in (
        Tile(128, 160, (1, 2)),
        Tile(128, 192, (1, 2)),
        Tile(128, 192, (2, 1)),
        Tile(192, 128, (1, 2)),
    )
}

Results = Sequence[Tensor]


class FusedProduct(NamedTuple):
    """A product and its end. tiles: texts of those that were quickest at some shape of four models on an H200."""

    name: str
    tiles: tuple[str, ...]


class FusedChoices(MeasuredChoices):
    """The tiles of one device, found by the first call of each shape; None: the product is computed apart."""

    def __init__(self, file: ChoiceFile) -> None:
        super().__init__(file)
        self.tiles: dict[tuple[Any, ...], Tile | None] = {}

    def find(self, key: tuple[Any, ...], apart: Callable[[], Results], fused: Callable[[Tile], Results]) -> Tile | None:
        """For a key that has none yet: the product, the dtype, and sizes."""
        product, dtype, *sizes = key
        kind = f"{product.name} {dtype_name(dtype)} {'x'.join(str(coarse(size)) for size in sizes)}"
        computes = {text: functools.partial(fused, TILES[text]) for text in product.tiles}
        with self._lock:
            try:
                text = self.of_kind(kind, lambda: measure(kind, apart, computes)).algorithm
            except NotNowError:
                return None
            except torch.OutOfMemoryError as error:
                logger.info("%s is computed apart: %s", kind, error)
                text = None
            if len(self.tiles) >= MOST_PLANS:
                self.tiles.clear()
            self.tiles[key] = tile = None if text is None else TILES[text]
            return tile


@functools.cache
def fused_choices_on(device: torch.device) -> FusedChoices | None:
    """Those of `device`; None where quack has nothing for it, or is not there."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != HOPPER:
        return None
    version = quack_version()
    if version not in CHECKED_QUACK:
        if version is not None:
            logger.info("quack-kernels %s is not used: %s was tried", version, ", ".join(CHECKED_QUACK))
        return None
    device_name = torch.cuda.get_device_name(device)
    return FusedChoices(ChoiceFile.of("fused_products", device_name, "quack", version, TILES.__contains__))


@functools.cache
def quack_version() -> str | None:
    try:
        return importlib.metadata.version("quack-kernels")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def epilogues() -> ModuleType:
    """`quack_epilogues`, which imports quack."""
    return importlib.import_module("neox_hf.kernels.quack_epilogues")


def fused_tile(
    product: FusedProduct,
    operands: Sequence[Tensor],
    sizes: tuple[int, int, int],
    apart: Callable[[], Results],
    fused: Callable[[Tile], Results],
) -> Tile | None:
    """The tile that `fused` is to be called with, or None if `apart` is quicker, or the only way.

    operands: all that quack would read. sizes: rows, terms of a sum, columns.
    """
    choices = fused_choices_on(operands[0].device)
    if choices is None or not all(map(lies_well, operands)):
        return None
    key = (product, operands[0].dtype, *sizes)
    return choices.tiles[key] if key in choices.tiles else choices.find(key, apart, fused)


def lies_well(x: Tensor) -> bool:
    """Whether rows, or columns, lie as the hardware's copies take them."""
    if x.data_ptr() % LEAST_ALIGNMENT or 1 not in x.stride():
        return False
    return all(stride == 1 or stride * x.element_size() % LEAST_ALIGNMENT == 0 for stride in x.stride())


def measure(kind: str, apart: Callable[[], Results], fused: Mapping[str, Callable[[], Results]]) -> Measured:
    """The quickest of `fused`, by tile, that computes the same, if it beats computing apart.

    Raises:
        NotNowError: these operands tell nothing, since their results are not finite.
    """
    expected = apart()
    if not all(bool(each.isfinite().all()) for each in expected):
        raise NotNowError
    computes: dict[str | None, Compute] = {None: apart}
    for text, compute in fused.items():
        reason = reason_against(compute, expected)
        if reason is None:
            computes[text] = compute
        else:
            logger.warning("%s is not computed by tiles of %s: %s", kind, text, reason)
    del expected
    found = quickest_of(computes)
    logger.info("%s: %.4f ms by %s, apart %.4f", kind, found.ms, found.algorithm, found.plain_ms)
    return found


def reason_against(compute: Callable[[], Results], expected: Results) -> str | None:
    """Why it does not count: it fails, or computes something else."""
    try:
        found = compute()
    except (AssertionError, RuntimeError, TypeError, ValueError, epilogues().DSLBaseError) as error:
        return f"{type(error).__name__}: {error}"
    distances = [relative_distance(*pair) for pair in zip(found, expected, strict=True)]
    far = [distance for distance in distances if not distance <= FAR_APART]
    return f"it is {max(far):.3g} away from the product and its end, computed apart" if far else None


def relative_distance(found: Tensor, expected: Tensor) -> float:
    found, expected = found.float(), expected.float()
    size = torch.linalg.vector_norm(expected)
    return float(torch.linalg.vector_norm(found - expected) / size.clamp_min(torch.finfo(torch.float32).tiny))
