"""The row-norm kernels as ops of torch: how they are launched, and their registration.

What is computed: `row_norm_kernels`. x, first, second and all results but gradients of parameters are [..., H]; weights
and biases [H], a scale norm's weight one number. What depends on shapes alone is worked out once for each.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_hf.kernels.column_sums import finish_column_sums
from neox_hf.kernels.devices import multiprocessors
from neox_hf.kernels.registration import register, register_fake
from neox_hf.kernels.row_norm_kernels import backward_rows, forward_rows, parameter_columns

TILE_ELEMENTS = 2048
"""Of the narrowest tile: 16 for each thread of four warps, two vectors of 16 bytes in half precision."""

SUMS_BYTES = 2**16
"""Partial gradients that a program keeps in registers, of which a multiprocessor has 2^18 bytes."""

WARPS_WITH_TWO_SUMS, WARPS_WITH_FOUR_SUMS = 16, 12
"""Warps whose registers a multiprocessor has: 120 a thread with one norm's partial gradients, 168 with two norms'."""

WIDEST_WITH_SUMS = 8192
"""Elements of the widest tile with 16 for each thread; more, with as many sums beside them, would leave registers."""

COLUMNS_AT_ONCE = 128
"""Columns of one program that sums up columns: 256 bytes of a row in half precision."""

PIPELINE_BYTES = 200 * 2**10
"""Shared memory of a multiprocessor for rows on their way, of 227 KiB."""


@dataclass(frozen=True)
class Tile:
    """What one program holds at a time: whole rows, padded to a power of two."""

    rows: int
    block: int

    @classmethod
    @functools.cache
    def of(cls, width: int) -> "Tile":
        block = 1 << (width - 1).bit_length()
        return cls(max(TILE_ELEMENTS // block, 1), block)

    @property
    def elements(self) -> int:
        return self.rows * self.block

    @functools.cached_property
    def warps(self) -> int:
        """16 elements a thread, as far as 16 warps go; 32 warps where a row is wider than 16384."""
        return 32 if self.elements > 16384 else min(self.elements // 512, 16)

    def covering(self, rows: int) -> int:
        """How many tiles there are in `rows`."""
        return -(-rows // self.rows)


@dataclass(frozen=True)
class BackwardPlan:
    """programs: how many run at once. stages: tiles on their way into a program.

    in_registers: whether partial gradients of the parameters fit beside a tile; if not, another kernel reads again.
    """

    programs: int
    stages: int
    in_registers: bool

    @classmethod
    @functools.lru_cache(1024)
    def of(
        cls, width: int, rows: int, parameters: int, kind: str, element_bytes: int, processors: int
    ) -> "BackwardPlan":
        """parameters: those that want a gradient. element_bytes: of all that is read for one element of x.
        processors: multiprocessors of the device."""
        tile = Tile.of(width)
        resident = max((WARPS_WITH_FOUR_SUMS if parameters > 2 else WARPS_WITH_TWO_SUMS) // tile.warps, 1)
        stages = max(min(PIPELINE_BYTES // resident // (tile.elements * element_bytes), 3), 1)
        fits = parameters * tile.elements * 4 <= SUMS_BYTES and tile.elements <= WIDEST_WITH_SUMS
        programs = min(tile.covering(rows), processors * resident)
        return cls(programs, stages, fits or kind == "scale")


@register("row_norm_forward")
def row_norm_forward(
    x: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    eps: float,
    kind: str,
    measured: int,
) -> list[Tensor]:
    """[total = x + first + second, if there is a first], y1, [y2, if there is a weight2]."""
    outputs = _forward_outputs(x, first, second, weight2)
    width = x.shape[-1]
    tile, rows = Tile.of(width), x.numel() // width
    if rows == 0:
        return outputs
    forward_rows[(tile.covering(rows),)](
        x.contiguous(),
        _contiguous(first),
        _contiguous(second),
        None if first is None else outputs[0],
        weight1.contiguous(),
        _contiguous(bias1),
        _contiguous(weight2),
        _contiguous(bias2),
        outputs[-1 if weight2 is None else -2],
        None if weight2 is None else outputs[-1],
        rows,
        eps,
        KIND=kind,
        WIDTH=width,
        MEASURED=measured,
        ROWS=tile.rows,
        BLOCK=tile.block,
        num_warps=tile.warps,
    )
    return outputs


@register_fake(row_norm_forward)
def _(x, first, second, weight1, bias1, weight2, bias2, eps, kind, measured):  # type: ignore[no-untyped-def]
    return _forward_outputs(x, first, second, weight2)


def _forward_outputs(x: Tensor, first: Tensor | None, second: Tensor | None, weight2: Tensor | None) -> list[Tensor]:
    dtype = x.dtype
    for branch in (first, second):
        if branch is not None and branch.dtype != dtype:
            dtype = torch.promote_types(dtype, branch.dtype)
    count = 1 + (first is not None) + (weight2 is not None)
    like = torch.contiguous_format
    return [torch.empty_like(x, dtype=dtype, memory_format=like) for _ in range(count)]


@register("row_norm_backward")
def row_norm_backward(
    x: Tensor,
    residual: Tensor | None,
    dy1: Tensor,
    dy2: Tensor | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    eps: float,
    kind: str,
    measured: int,
    wants_x: bool,
    parameters_dtype: torch.dtype | None,
    recompute: bool,
) -> list[Tensor]:
    """[dx], [y1, y2 again], [gradients of the parameters]: each if wanted, and y2 if there is a weight2.

    residual: a gradient of x that dx starts from. parameters_dtype: of the gradients [parameters, H] in the order of
    the arguments ([1, 1] for scale), or None to do without them.
    """
    affines = weight1, bias1, weight2, bias2
    writes = _backward_rows_outputs(x, weight2, wants_x, recompute)
    found = [each for each in writes if each is not None]
    wants_parameters = parameters_dtype is not None
    if x.numel() == 0:
        return [*found, x.new_zeros(_parameters_shape(affines), dtype=parameters_dtype)] if wants_parameters else found
    if found or wants_parameters:
        affines = [_contiguous(each) for each in affines]
        reads = [x.contiguous(), _contiguous(residual) if wants_x else None, dy1.contiguous(), _contiguous(dy2)]
        sums = _launch_backward(reads, affines, writes, eps, kind, measured, wants_parameters)
        if sums is not None:
            found.append(finish_column_sums(sums, parameters_dtype, _parameters_shape(affines)))
    return found


@register_fake(row_norm_backward)
def _(  # type: ignore[no-untyped-def]
    x, residual, dy1, dy2, weight1, bias1, weight2, bias2, eps, kind, measured, wants_x, parameters_dtype, recompute
):
    found = [each for each in _backward_rows_outputs(x, weight2, wants_x, recompute) if each is not None]
    if parameters_dtype is None:
        return found
    return [*found, x.new_empty(_parameters_shape((weight1, bias1, weight2, bias2)), dtype=parameters_dtype)]


def _backward_rows_outputs(
    x: Tensor, weight2: Tensor | None, wants_x: bool, recompute: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, y1 and y2; None where not wanted."""
    wanted = wants_x, recompute, recompute and weight2 is not None
    like = torch.contiguous_format
    return tuple([torch.empty_like(x, memory_format=like) if each else None for each in wanted])


def _parameters_shape(affines: tuple[Tensor | None, ...]) -> tuple[int, int]:
    return sum([each is not None for each in affines]), affines[0].numel()


def _launch_backward(
    reads: list[Tensor | None],
    affines: list[Tensor | None],
    writes: tuple[Tensor | None, ...],
    eps: float,
    kind: str,
    measured: int,
    wants_parameters: bool,
) -> Tensor | None:
    """Fills writes (dx, y1, y2, each where there is one) and returns partial gradients of the parameters
    [programs, parameters * H], if they are wanted.

    All contiguous. reads: x, residual, dy1, dy2. affines: weight1, bias1, weight2, bias2.
    """
    x = reads[0]
    width, (parameters, numbers) = x.shape[-1], _parameters_shape(affines)
    rows, tile = x.numel() // width, Tile.of(width)
    element_bytes = sum([each.itemsize for each in reads if each is not None])
    processors = multiprocessors(x.device)
    plan = BackwardPlan.of(width, rows, parameters if wants_parameters else 0, kind, element_bytes, processors)
    sums = moments = None
    if wants_parameters and plan.in_registers:
        sums_dtype = torch.float64 if kind == "scale" else torch.float32
        sums = x.new_empty((plan.programs, parameters * numbers), dtype=sums_dtype)
    elif wants_parameters:
        moments = x.new_empty((2, rows), dtype=torch.float32)
    backward_rows[(plan.programs,)](
        *reads,
        *affines,
        *writes,
        sums,
        moments,
        rows,
        eps,
        BIASED1=affines[1] is not None,
        BIASED2=affines[3] is not None,
        KIND=kind,
        WIDTH=width,
        MEASURED=measured,
        ROWS=tile.rows,
        BLOCK=tile.block,
        STAGES=plan.stages,
        num_warps=tile.warps,
    )
    return sums if moments is None else _sum_columns(reads, affines, moments)


def _sum_columns(reads: list[Tensor | None], affines: list[Tensor | None], moments: Tensor) -> Tensor:
    """Partial gradients [programs, parameters * H] by a second look at x and the gradients."""
    x, _, dy1, dy2 = reads
    width, rows = x.shape[-1], moments.shape[1]
    columns, rows_at_once = -(-width // COLUMNS_AT_ONCE), TILE_ELEMENTS // COLUMNS_AT_ONCE
    programs = min(-(-rows // rows_at_once), -(-4 * multiprocessors(x.device) // columns))
    sums = x.new_empty((programs, _parameters_shape(affines)[0] * width), dtype=torch.float32)
    parameter_columns[(programs, columns)](
        x,
        dy1,
        dy2,
        moments,
        sums,
        rows,
        BIASED1=affines[1] is not None,
        BIASED2=affines[3] is not None,
        WIDTH=width,
        ROWS=rows_at_once,
        COLS=COLUMNS_AT_ONCE,
    )
    return sums


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
