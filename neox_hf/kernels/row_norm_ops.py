"""The row-norm kernels as ops of torch: how they are launched, and their registration.

What is computed: `row_norm_kernels`. x, first, second and all results but gradients of parameters are [..., H]; weights
and biases [H], a scale norm's weight one number.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from neox_hf.kernels.column_sums import finish_column_sums, multiprocessors
from neox_hf.kernels.language import triton
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
    def of(cls, width: int) -> "Tile":
        block = triton.next_power_of_2(width)
        return cls(max(TILE_ELEMENTS // block, 1), block)

    @property
    def elements(self) -> int:
        return self.rows * self.block

    @property
    def warps(self) -> int:
        """16 elements a thread, as far as 16 warps go; 32 warps where a row is wider than 16384."""
        return 32 if self.elements > 16384 else min(self.elements // 512, 16)


@dataclass(frozen=True)
class BackwardPlan:
    """programs: how many run at once. stages: tiles on their way into a program.

    in_registers: whether partial gradients of the parameters fit beside a tile; if not, another kernel reads again.
    """

    programs: int
    stages: int
    in_registers: bool

    @classmethod
    def of(
        cls, tile: Tile, rows: int, parameters: int, kind: str, element_bytes: int, processors: int
    ) -> "BackwardPlan":
        """parameters: those that want a gradient. element_bytes: of all that is read for one element of x.
        processors: multiprocessors of the device."""
        resident = max((WARPS_WITH_FOUR_SUMS if parameters > 2 else WARPS_WITH_TWO_SUMS) // tile.warps, 1)
        stages = max(min(PIPELINE_BYTES // resident // (tile.elements * element_bytes), 3), 1)
        fits = parameters * tile.elements * 4 <= SUMS_BYTES and tile.elements <= WIDEST_WITH_SUMS
        programs = min(triton.cdiv(rows, tile.rows), processors * resident)
        return cls(programs, stages, fits or kind == "scale")


@dataclass(frozen=True)
class BackwardLaunch:
    """`backward_rows` on contiguous tensors. reads: x, residual, dy1, dy2. affines: weight1, bias1, weight2, bias2."""

    reads: list[Tensor | None]
    affines: list[Tensor | None]
    eps: float
    kind: str
    measured: int

    @property
    def rows(self) -> int:
        return self.reads[0].numel() // self.width

    @property
    def width(self) -> int:
        return self.reads[0].shape[-1]

    @property
    def parameters(self) -> int:
        return sum(each is not None for each in self.affines)

    @property
    def biased(self) -> dict[str, bool]:
        return {"BIASED1": self.affines[1] is not None, "BIASED2": self.affines[3] is not None}

    def plan(self, wants_parameters: bool) -> BackwardPlan:
        element_bytes = sum(each.element_size() for each in self.reads if each is not None)
        parameters = self.parameters if wants_parameters else 0
        processors = multiprocessors(self.reads[0].device)
        return BackwardPlan.of(Tile.of(self.width), self.rows, parameters, self.kind, element_bytes, processors)

    def run(self, writes: tuple[Tensor | None, ...], wants_parameters: bool) -> Tensor | None:
        """Fills writes (dx, y1, y2, each where there is one) and returns partial gradients of the parameters
        [programs, parameters * H], if they are wanted."""
        plan, x = self.plan(wants_parameters), self.reads[0]
        sums = moments = None
        if wants_parameters and plan.in_registers:
            sums = x.new_empty((plan.programs, self.parameters * self.affines[0].numel()), dtype=torch.float32)
        elif wants_parameters:
            moments = x.new_empty((2, self.rows), dtype=torch.float32)
        tile = Tile.of(self.width)
        backward_rows[(plan.programs,)](
            *self.reads,
            *self.affines,
            *writes,
            sums,
            moments,
            self.rows,
            self.eps,
            **self.biased,
            KIND=self.kind,
            WIDTH=self.width,
            MEASURED=self.measured,
            ROWS=tile.rows,
            BLOCK=tile.block,
            STAGES=plan.stages,
            num_warps=tile.warps,
        )
        return self.sum_columns(moments) if moments is not None else sums

    def sum_columns(self, moments: Tensor) -> Tensor:
        """Partial gradients [programs, parameters * H] by a second look at x and the gradients."""
        x, _, dy1, dy2 = self.reads
        columns, rows_at_once = triton.cdiv(self.width, COLUMNS_AT_ONCE), TILE_ELEMENTS // COLUMNS_AT_ONCE
        programs = min(triton.cdiv(self.rows, rows_at_once), triton.cdiv(4 * multiprocessors(x.device), columns))
        sums = x.new_empty((programs, self.parameters * self.width), dtype=torch.float32)
        parameter_columns[(programs, columns)](
            x,
            dy1,
            dy2,
            moments,
            sums,
            self.rows,
            **self.biased,
            WIDTH=self.width,
            ROWS=rows_at_once,
            COLS=COLUMNS_AT_ONCE,
        )
        return sums


# Custom ops rather than triton ops: a tracer that looks inside would need kernels it can trace, and the interpreter's,
# which tests run, are not. A compiler has nothing to fuse into them either.


@torch.library.custom_op("neox_hf::row_norm_forward", mutates_args=())
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
    total = None if first is None else outputs[0]
    y1, y2 = outputs[-1 if weight2 is None else -2], None if weight2 is None else outputs[-1]
    sources = [_contiguous(each) for each in (x, first, second)]
    with torch.cuda.device_of(x):
        forward_rows[(triton.cdiv(rows, tile.rows),)](
            *sources,
            total,
            *[_contiguous(each) for each in (weight1, bias1, weight2, bias2)],
            y1,
            y2,
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


@row_norm_forward.register_fake
def _(x, first, second, weight1, bias1, weight2, bias2, eps, kind, measured):  # type: ignore[no-untyped-def]
    return _forward_outputs(x, first, second, weight2)


def _forward_outputs(x: Tensor, first: Tensor | None, second: Tensor | None, weight2: Tensor | None) -> list[Tensor]:
    dtype = x.dtype
    for branch in (first, second):
        dtype = dtype if branch is None else torch.promote_types(dtype, branch.dtype)
    count = 1 + (first is not None) + (weight2 is not None)
    return [x.new_empty(x.shape, dtype=dtype) for _ in range(count)]


@torch.library.custom_op("neox_hf::row_norm_backward", mutates_args=())
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
    rows_out = _backward_rows_outputs(x, weight2, wants_x, recompute)
    found = [each for each in rows_out if each is not None]
    shape = _parameters_shape(affines)
    if parameters_dtype is None and not found:
        return []
    if x.numel() == 0:
        return found if parameters_dtype is None else [*found, x.new_zeros(shape, dtype=parameters_dtype)]
    reads = [_contiguous(each) for each in (x, residual if wants_x else None, dy1, dy2)]
    launch = BackwardLaunch(reads, [_contiguous(each) for each in affines], eps, kind, measured)
    with torch.cuda.device_of(x):
        sums = launch.run(rows_out, wants_parameters=parameters_dtype is not None)
        return found if sums is None else [*found, finish_column_sums(sums, parameters_dtype).view(shape)]


@row_norm_backward.register_fake
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
    return tuple(x.new_empty(x.shape) if each else None for each in wanted)


def _parameters_shape(affines: tuple[Tensor | None, ...]) -> tuple[int, int]:
    return sum(each is not None for each in affines), affines[0].numel()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
