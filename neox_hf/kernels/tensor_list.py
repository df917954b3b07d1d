"""Many tensors in one launch: a table on the device of where they lie and how they are cut into chunks.

Row t of the table is one parameter with all that belongs to it; a column is one kind of tensor (weights, gradients
and so on) of one dtype. Program p of a launch takes chunk p: it finds its row, an interval of that row's elements, and
makes pointers of the row's addresses. So parameters stay where they are, whoever allocated them, and a step over
hundreds of them is one launch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neox_hf.kernels.language import tl, triton

ELEMENT_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int16: tl.int16,
}
"""What a kernel reads an address as."""

LARGEST_CHUNK = 65536
"""Elements of a chunk, so that finding it costs nothing."""

FEWEST_CHUNKS = 8192
"""Eight waves of eight programs on each of 132 multiprocessors: the last wave, half empty, is then a small part."""


@dataclass(frozen=True)
class Layout:
    """How tensors of these lengths are cut; the same for all columns.

    numels: [tensors] int64, elements. first_chunks: [tensors] int64. owners: [chunks] int32, the row of each chunk.
    chunk: elements of a chunk, but for the last one of a tensor.
    """

    numels: Tensor
    first_chunks: Tensor
    owners: Tensor
    chunk: int

    @property
    def tensors(self) -> int:
        return self.numels.numel()

    @property
    def chunks(self) -> int:
        return self.owners.numel()


@dataclass(frozen=True)
class TensorTable:
    """A layout with the addresses [tensors, columns] int64 of the tensors themselves."""

    layout: Layout
    addresses: Tensor


class TensorTables:
    """The tables of a caller who comes back every step: made anew only where a tensor has moved.

    A look costs the host some 0.1 us a tensor; no table is ever read back, so nothing waits for the device.
    """

    def __init__(self) -> None:
        self._layouts: dict[tuple, Layout] = {}
        self._tables: dict[tuple, tuple[tuple[int, ...], TensorTable]] = {}

    def table(self, columns: Sequence[Sequence[Tensor]], largest_chunk: int = LARGEST_CHUNK) -> TensorTable:
        """The table of `columns`, each a list with one tensor for each row.

        Raises:
            ValueError: a tensor is not contiguous, of a dtype that no kernel reads, on another device than the first,
                or neither as long as the first of its row nor one number.
        """
        device = columns[0][0].device
        shape = (device, len(columns), largest_chunk, *[tensor.numel() for tensor in columns[0]])
        pointers = tuple([tensor.data_ptr() for row in zip(*columns, strict=True) for tensor in row])
        known, table = self._tables.get(shape, (None, None))
        if known != pointers:
            _check(columns, device)
            _check_lengths(columns)
            if shape not in self._layouts:
                self._layouts[shape] = layout_of(shape[3:], device, largest_chunk)
            addresses = _on_device(torch.tensor(pointers, dtype=torch.int64), device).view(-1, len(columns))
            table = TensorTable(self._layouts[shape], addresses)
            self._tables[shape] = (pointers, table)
        return table


def layout_of(numels: Sequence[int], device: torch.device, largest_chunk: int = LARGEST_CHUNK) -> Layout:
    """Cut tensors of `numels` elements."""
    lengths = torch.tensor(numels, dtype=torch.int64)
    chunk = chunk_elements(sum(numels), largest_chunk)
    counts = (lengths + chunk - 1) // chunk
    owners = torch.repeat_interleave(torch.arange(len(numels), dtype=torch.int32), counts)
    first_chunks = counts.cumsum(0) - counts
    return Layout(*(_on_device(column, device) for column in (lengths, first_chunks, owners)), chunk)


def chunk_elements(total: int, largest: int = LARGEST_CHUNK) -> int:
    """Elements of a chunk: the most that still make enough chunks to keep the device busy."""
    chunk = largest
    while chunk > 4096 and total < chunk * FEWEST_CHUNKS:
        chunk //= 2
    return chunk


def _check(columns: Sequence[Sequence[Tensor]], device: torch.device) -> None:
    for tensor in (tensor for column in columns for tensor in column):
        if not tensor.is_contiguous() or tensor.device != device:
            raise ValueError(
                f"a kernel over many tensors wants all contiguous and on {device}, and found one of shape "
                f"{tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}; use kernels='torch'"
            )
        if tensor.dtype not in ELEMENT_TYPES:
            readable = ", ".join(str(dtype) for dtype in ELEMENT_TYPES)
            raise ValueError(f"a kernel over many tensors reads {readable}, not {tensor.dtype}; use kernels='torch'")


def _check_lengths(columns: Sequence[Sequence[Tensor]]) -> None:
    for first, *others in zip(*columns, strict=True):
        for tensor in others:
            if tensor.numel() not in (1, first.numel()):
                raise ValueError(
                    f"a parameter of shape {tuple(first.shape)} has something of shape {tuple(tensor.shape)} beside "
                    "it, which is neither as long nor one number"
                )


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    """Copied without waiting, which takes memory that the device can read by itself."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


@triton.jit
def find_chunk(owners, first_chunks, numels, CHUNK: tl.constexpr):
    """This program's row, the first of its elements (int64) and their number."""
    program = tl.program_id(0)
    row = tl.load(owners + program).to(tl.int64)
    start = (program - tl.load(first_chunks + row)) * CHUNK
    return row, start, tl.minimum(tl.load(numels + row) - start, CHUNK).to(tl.int32)


@triton.jit
def is_aligned(address):
    """Whether the widest vector access, 16 bytes, may be used."""
    return (address & 15) == 0
