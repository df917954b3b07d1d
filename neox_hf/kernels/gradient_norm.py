"""The norm of all gradients together, each read once.

    norm = sqrt(sum over tensors and elements of gradient²)

Squares are summed in fp32: first within chunks, each by one program, then over the chunks. The order never depends on
timing, so the same gradients give the same bits. Source: Pascanu et al., 2013, arXiv 1211.5063 (clipping by norm).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_hf.kernels.dispatch import Op
from neox_hf.kernels.language import tl, triton
from neox_hf.kernels.launch_choice import LaunchChoice, for_every_shape
from neox_hf.kernels.tensor_list import ELEMENT_TYPES, TensorTables, find_chunk, is_aligned


@dataclass(frozen=True)
class SumLaunch:
    """block: elements that a program reads at a time, as often as it takes. warps: of it."""

    block: int
    warps: int


SQUARE_SUM = LaunchChoice(
    "gradient_norm",
    for_every_shape(SumLaunch(4096, 4), SumLaunch(2048, 4), SumLaunch(2048, 8), SumLaunch(4096, 8), SumLaunch(8192, 8)),
)


def square_sum_reference(gradients: Sequence[Tensor], tables: TensorTables) -> Tensor:
    """The norm of each tensor by torch, which sums low precision in fp32; fp64 stays fp64 until the end."""
    norms = torch._foreach_norm([g if g.dtype == torch.float64 else g.float() for g in gradients])
    return torch.stack(norms).square().sum().float()


@triton.jit
def _square_sum_kernel(
    addresses, owners, first_chunks, numels, sums, ELEMENT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    row, start, length = find_chunk(owners, first_chunks, numels, CHUNK)
    address = tl.load(addresses + row)
    gradient = address.to(tl.pointer_type(ELEMENT)) + start
    whole = tl.where(is_aligned(address), length // BLOCK, 0) * BLOCK
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(0, whole, BLOCK):
        x = tl.load(tl.multiple_of(gradient, 16) + (at + columns)).to(tl.float32)
        total += x * x
    for at in range(whole, length, BLOCK):
        x = tl.load(gradient + at + columns, mask=at + columns < length, other=0.0).to(tl.float32)
        total += x * x
    tl.store(sums + tl.program_id(0), tl.sum(total))


def square_sum_triton(gradients: Sequence[Tensor], tables: TensorTables) -> Tensor:
    gradients = [g.contiguous() for g in gradients]
    table = tables.table([gradients])
    layout = table.layout
    launch = SQUARE_SUM.chosen(gradients[0].device, gradients[0].dtype)
    sums = torch.empty(layout.chunks, dtype=torch.float32, device=gradients[0].device)
    if layout.chunks:
        _square_sum_kernel[(layout.chunks,)](
            table.addresses,
            layout.owners,
            layout.first_chunks,
            layout.numels,
            sums,
            ELEMENT=ELEMENT_TYPES[gradients[0].dtype],
            CHUNK=layout.chunk,
            BLOCK=launch.block,
            num_warps=launch.warps,
        )
    return sums.sum()


GRADIENT_NORM = Op("gradient_norm", torch=square_sum_reference, triton=square_sum_triton)


@torch.no_grad()
def gradient_square_sum(
    gradients: Sequence[Tensor], *, tables: TensorTables | None = None, backend: str = "auto"
) -> Tensor:
    """The square of the norm, which ranks add up: an fp32 scalar on the gradients' device.

    No gradients give 0 on the CPU. Reading nothing back, it never waits for the device.

    Args:
        gradients: of any shapes and floating dtypes, on one device.
        tables: the caller's, if it comes back with the same tensors.
    """
    tables = TensorTables() if tables is None else tables
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    sums = [GRADIENT_NORM.choose(backend, alike[0])(alike, tables) for alike in by_dtype.values()]
    return sum(sums[1:], sums[0]) if sums else torch.zeros(())


@torch.no_grad()
def gradient_norm(gradients: Sequence[Tensor], *, tables: TensorTables | None = None, backend: str = "auto") -> Tensor:
    """The 2-norm of all gradients together: an fp32 scalar on their device. Arguments as of `gradient_square_sum`."""
    return gradient_square_sum(gradients, tables=tables, backend=backend).sqrt()


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of `norm` are multiplied by so that their norm is at most `max_norm`, as torch computes it."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
