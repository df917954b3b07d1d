"""Tensors in eight bits: bytes, magnitudes and sums, in the interpreter and by the reference."""

import pytest
import torch

from neox_hf.kernels.fp8_cast import fp8_cast, fp8_cast_triton
from neox_hf.kernels.fp8_format import E4M3, empty_fp8, padded
from tests.kernels.fp8_cases import FORMATS, a_table, check_cast, check_not_finite, same_numbers, wide_values


@pytest.mark.parametrize("known", [None, 1e4])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 48), (131, 70)])
def test_cast(shape, dtype, form, known):
    check_cast("cpu", shape, dtype, form, known)


@pytest.mark.parametrize("form", FORMATS)
def test_every_number_halfway_and_beside_rounds_as_torch_rounds(form):
    codes = torch.arange(128, dtype=torch.uint8).view(form).float()
    codes = codes[codes.isfinite()].sort().values
    halves = (codes[1:] + codes[:-1]) / 2
    x = torch.cat([codes, halves, halves.nextafter(codes[1:]), halves.nextafter(codes[:-1])])
    x = torch.cat([x, -x])
    x = torch.nn.functional.pad(x, (0, -len(x) % 16)).view(16, -1)
    slot = a_table("cpu", known=torch.finfo(form).max, x=form).slots["x"]
    slot.scale.fill_(1)
    assert same_numbers(fp8_cast(x, slot, backend="triton")[0].rows, x.to(form))


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_not_finite(form):
    check_not_finite("cpu", form)


@pytest.mark.parametrize("form", FORMATS)
def test_the_reference_is_the_kernel(form):
    x = wide_values(21, 32, "cpu", torch.bfloat16)
    x[3, 3], x[4, 4] = torch.nan, torch.inf
    made = []
    for backend in ("torch", "triton"):
        slot = a_table("cpu", known=10.0, x=form).slots["x"]
        cast, sums = fp8_cast(x, slot, sum_dtype=torch.float32, backend=backend)
        made.append((cast.rows, cast.columns, slot.amax, sums))
    assert all(same_numbers(*pair) for pair in zip(*(each[:3] for each in made), strict=True))
    torch.testing.assert_close(made[0][3], made[1][3], equal_nan=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_of_nothing(backend):
    slot = a_table("cpu", x=E4M3).slots["x"]
    cast, sums = fp8_cast(torch.empty(0, 32), slot, sum_dtype=torch.float32, backend=backend)
    assert cast.rows.shape == (0, 32)
    assert cast.columns.shape == (32, 0)
    assert sums.tolist() == [0.0] * 32
    assert slot.amax.item() == 0


def test_one_way_alone():
    slot = a_table("cpu", known=4.0, x=E4M3).slots["x"]
    x = torch.randn(6, 32).t().contiguous().t()
    whole, sums = fp8_cast(x, slot, backend="triton")
    assert sums is None
    rows, _ = fp8_cast(x, slot, columns=False, backend="triton")
    columns, _ = fp8_cast(x, slot, rows=False, backend="triton")
    assert rows.columns is None
    assert columns.rows is None
    assert same_numbers(rows.rows, whole.rows)
    assert same_numbers(columns.columns, whole.columns)


def test_magnitudes_add_up_over_calls():
    slot = a_table("cpu", known=1.0, x=E4M3).slots["x"]
    for value in (2.0, -5.0, 3.0):
        fp8_cast(torch.full((16, 16), value), slot, backend="triton")
    assert slot.amax.item() == 5


def test_the_operator_is_one_of_torch_s():
    slot = a_table("cpu", known=4.0, x=E4M3).slots["x"]
    x = torch.randn(6, 32)
    arguments = (x, slot.scale, slot.amax, empty_fp8(6, 32, E4M3, x.device), empty_fp8(32, padded(6), E4M3, x.device))
    torch.library.opcheck(fp8_cast_triton, (*arguments, None), test_utils=("test_faketensor",))
    # What `test_schema` would see, which cannot compare eight bits: the arguments that say so were changed.
    before = [argument._version for argument in arguments]
    fp8_cast_triton(*arguments, None)
    assert [argument._version > version for argument, version in zip(arguments, before, strict=True)] == [
        False,
        False,
        True,
        True,
        True,
    ]
