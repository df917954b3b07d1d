"""How many tensors become one launch."""

import pytest
import torch

from neox_hf.kernels.tensor_list import FEWEST_CHUNKS, TensorTables, chunk_elements, layout_of


@pytest.mark.parametrize("total", [0, 1, 10**6, 162_322_944, 1_414_647_808, 6_857_302_016])
def test_chunks_are_large_unless_the_device_would_idle(total):
    chunk = chunk_elements(total)
    assert chunk in (4096, 8192, 16384, 32768, 65536)
    assert chunk == 4096 or total / chunk >= FEWEST_CHUNKS
    assert chunk == 65536 or total / (2 * chunk) < FEWEST_CHUNKS


def test_the_largest_chunk_can_be_said():
    assert chunk_elements(10**9, 1024) == 1024
    assert layout_of([3000, 1], torch.device("cpu"), 1024).owners.tolist() == [0, 0, 0, 1]


def test_each_element_is_in_one_chunk():
    layout = layout_of([5000, 0, 1, 4096, 8193], torch.device("cpu"))
    assert layout.owners.tolist() == [0, 0, 2, 3, 4, 4, 4]
    assert layout.first_chunks.tolist() == [0, 2, 2, 3, 4]
    assert (layout.tensors, layout.chunks, layout.chunk) == (5, 7, 4096)


def test_a_table_is_kept_until_a_tensor_moves():
    tables, columns = TensorTables(), [[torch.zeros(3), torch.zeros(4)], [torch.zeros(3), torch.zeros(4)]]
    table = tables.table(columns)
    assert table.addresses.tolist() == [[row.data_ptr() for row in rows] for rows in zip(*columns, strict=True)]
    assert tables.table(columns) is table
    columns[1][0] = torch.zeros(3)
    moved = tables.table(columns)
    assert moved.addresses[0, 1] == columns[1][0].data_ptr()
    assert moved.layout is table.layout


def test_tensors_elsewhere_are_refused():
    with pytest.raises(ValueError, match=r"all contiguous and on cpu, and found one of shape \(3,\).* on meta"):
        TensorTables().table([[torch.zeros(3), torch.zeros(3, device="meta")]])


def test_tensors_that_are_not_as_long_are_refused():
    weight = torch.zeros(3, 4)
    TensorTables().table([[weight], [torch.zeros(4, 3)], [torch.zeros(())]])
    with pytest.raises(ValueError, match=r"a parameter of shape \(3, 4\) has something of shape \(11,\) beside it"):
        TensorTables().table([[weight], [torch.zeros(11)]])


def test_dtypes_that_no_kernel_reads_are_refused():
    with pytest.raises(ValueError, match=r"reads torch\.float32, .*, not torch\.float64; use kernels='torch'"):
        TensorTables().table([[torch.zeros(3, dtype=torch.float64)]])


def test_columns_have_one_tensor_for_each_row():
    with pytest.raises(ValueError, match="shorter"):
        TensorTables().table([[torch.zeros(3), torch.zeros(4)], [torch.zeros(3)]])
