"""All weights of a model rounded to eight bits in one launch, as they are once a step.

What `Fp8Weight.refresh` does for each. A table on the device says where weights and their casts lie, how large they
are and which slot is theirs; program p finds the weight that tile p belongs to, and casts that tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_hf.kernels.fp8_cast import FP8_CAST, cast_tile
from neox_hf.kernels.fp8_format import TILE, format_constants
from neox_hf.kernels.fp8_linear import Fp8Weight
from neox_hf.kernels.language import tl, triton
from neox_hf.kernels.tensor_list import ELEMENT_TYPES, _on_device

VECTOR = 16
"""Bytes that addresses are to be multiples of."""


@triton.jit
def _refresh_kernel(
    table,
    owners,
    scale,
    amax,
    WEIGHT: tl.constexpr,
    MANTISSA: tl.constexpr,
    BY_HAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    entry = table + tl.load(owners + tl.program_id(0)).to(tl.int64) * 7
    x = tl.multiple_of(tl.load(entry).to(tl.pointer_type(WEIGHT)), 16)
    as_rows = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(tl.uint8)), 16)
    as_columns = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(tl.int32)), 16)
    rows = tl.multiple_of(tl.load(entry + 3).to(tl.int32), 16)
    columns = tl.multiple_of(tl.load(entry + 4).to(tl.int32), 16)
    slot, tile = tl.load(entry + 5), tl.program_id(0) - tl.load(entry + 6).to(tl.int32)
    blocks = tl.cdiv(columns, COLUMNS)
    cast_tile(
        x,
        scale + slot,
        amax + slot,
        as_rows,
        as_columns,
        None,
        tile // blocks * ROWS,
        tile % blocks * COLUMNS,
        rows,
        columns,
        rows,
        MANTISSA,
        BY_HAND,
        False,
        ROWS,
        COLUMNS,
    )


@dataclass(frozen=True)
class _Plan:
    """table: [weights, 7] int64: three addresses, rows, columns, slot, first tile. owners: [tiles] int32."""

    known: tuple[int, ...]
    table: Tensor
    owners: Tensor


def _plan(known: tuple[int, ...], weights: Sequence[Tensor], casts: Sequence[Fp8Weight]) -> _Plan:
    counts = torch.tensor([TILE.grid(*weight.shape)[0] for weight in weights])
    first = (counts.cumsum(0) - counts).tolist()
    lines = [
        [weight.data_ptr(), *cast.addresses, *weight.shape, cast.slot.index, start]
        for weight, cast, start in zip(weights, casts, first, strict=True)
    ]
    owners = torch.repeat_interleave(torch.arange(len(weights), dtype=torch.int32), counts)
    device = weights[0].device
    return _Plan(known, _on_device(torch.tensor(lines, dtype=torch.int64), device), _on_device(owners, device))


def _fits_one_launch(cast: Fp8Weight, weight: Tensor) -> bool:
    """Whether it was made before, by the kernel, and is now scaled by what steps before have shown."""
    aligned = weight.is_contiguous() and weight.data_ptr() % VECTOR == 0
    known = cast.addresses is not None and cast.slot.knows()
    return known and aligned and FP8_CAST.has_kernel_for(cast.backend, weight)


@torch.no_grad()
def refresh_weights(casts: Sequence[Fp8Weight], weights: Sequence[Tensor]) -> None:
    """`refresh` each of `casts`, whose slots are of one table, by its weight [out, in]: in one launch a dtype and
    device, but for those that are made for the first time."""
    groups: dict[tuple[torch.device, torch.dtype, torch.dtype], list[tuple[Fp8Weight, Tensor]]] = {}
    for cast, weight in zip(casts, weights, strict=True):
        if _fits_one_launch(cast, weight):
            groups.setdefault((weight.device, weight.dtype, cast.slot.dtype), []).append((cast, weight.detach()))
        else:
            cast.refresh(weight)
    for group, pairs in groups.items():
        _launch(group, *zip(*pairs, strict=True))


def _launch(
    group: tuple[torch.device, torch.dtype, torch.dtype], casts: Sequence[Fp8Weight], weights: Sequence[Tensor]
) -> None:
    scales = casts[0].slot.table
    known = tuple([address for cast, weight in zip(casts, weights, strict=True) for address in
                   (weight.data_ptr(), *cast.addresses)])  # fmt: skip
    plan = scales.plans.get(group)
    if plan is None or plan.known != known:
        plan = scales.plans[group] = _plan(known, weights, casts)
    _refresh_kernel[(plan.owners.numel(),)](
        plan.table,
        plan.owners,
        scales.scale,
        scales.amax,
        WEIGHT=ELEMENT_TYPES[group[1]],
        **format_constants(group[2]),
        ROWS=TILE.rows,
        COLUMNS=TILE.columns,
        num_warps=TILE.warps,
    )
    for cast, weight in zip(casts, weights, strict=True):
        cast.was_written(weight)
