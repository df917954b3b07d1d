"""The row-norm kernels as ops of torch: how they are launched, and their registration.

What is computed: `row_norm_kernels`; how it is dealt out to programs: `row_norm_launches`. x, first, second and all
results but gradients of parameters are [..., H]; weights and biases [H], a scale norm's weight one number.
"""

import torch
from torch import Tensor

from neox_hf.kernels.column_sums import finish_column_sums
from neox_hf.kernels.devices import multiprocessors
from neox_hf.kernels.registration import register, register_fake
from neox_hf.kernels.row_norm_kernels import backward_rows, forward_rows, parameter_columns
from neox_hf.kernels.row_norm_launches import BACKWARD, FORWARD, TILE_ELEMENTS, BackwardPlan, Tile

COLUMNS_AT_ONCE = 128
"""Columns of one program that sums up columns: 256 bytes of a row in half precision."""

NOT_KEPT = "evict_first"
"""From the second cache, where nothing is added to x: on an H200 2 % of the time; with branches it would cost 5."""


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
    if x.numel() == 0:
        return outputs
    width = x.shape[-1]
    rows = x.numel() // width
    tensors = len(outputs) + 1 + (first is not None) + (second is not None)
    tile = FORWARD.chosen(x.device, x.dtype, width, tensors)
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
        EVICTION=NOT_KEPT if first is None else "",
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
    summed = parameters if wants_parameters else 0
    launch = BACKWARD.chosen(x.device, x.dtype, width, summed, element_bytes)
    processors = multiprocessors(x.device)
    plan = BackwardPlan.of(width, rows, summed, kind, element_bytes, processors, launch.resident)
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
        num_warps=launch.warps,
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
