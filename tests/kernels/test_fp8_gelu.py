"""GELU into eight bits and back: the kernels in the interpreter, and the reference."""

import pytest
import torch

from neox_hf.kernels.fp8_format import E4M3, E5M2
from neox_hf.kernels.fp8_gelu import gelu_backward_to_fp8, gelu_backward_triton, gelu_forward_triton, gelu_to_fp8
from tests.kernels.fp8_cases import a_table, check_gelu


@pytest.mark.parametrize("known", [None, 8.0])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("form", ["erf", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu(dtype, form, biased, known):
    """More columns than a tile has, and not a whole number of its rows."""
    check_gelu("cpu", (21, 70), dtype, form, biased, known)


@pytest.mark.parametrize(("dtype", "form"), [(torch.float32, "tanh"), (torch.bfloat16, "erf")])
def test_gelu_of_more_rows_than_a_tile_has(dtype, form):
    check_gelu("cpu", (133, 70), dtype, form, biased=True, known=8.0)


@pytest.mark.parametrize("form", ["erf", "tanh"])
def test_the_reference_is_the_kernel(form):
    x, dy, bias = torch.randn(21, 32).bfloat16(), torch.randn(21, 32).bfloat16(), torch.randn(32).bfloat16()
    made = []
    for backend in ("torch", "triton"):
        slots = a_table("cpu", known=4.0, y=E4M3, dx=E5M2).slots
        y8 = gelu_to_fp8(x, bias, form, slots["y"], backend=backend)
        dx8, columns, dbias = gelu_backward_to_fp8(
            dy, x, bias, form, slots["dx"], slots["y"], torch.float32, backend=backend
        )
        made.append((y8.dequantised(), dx8.dequantised(), columns.columns.float(), dx8.columns.float(), dbias))
    for reference, kernel in zip(*made, strict=True):
        # Where the two differ in fp32's last bits, a number may round to the next of eight bits.
        assert (reference - kernel).norm() < 0.01 * reference.norm()


def test_the_operators_are_torch_s():
    x, scale = torch.randn(6, 32), torch.ones(1)
    rows = torch.empty(6, 32, dtype=E4M3)
    forward = (x, None, "erf", scale, torch.zeros(1), rows)
    torch.library.opcheck(gelu_forward_triton, forward, test_utils=("test_faketensor",))
    columns = torch.empty(32, 16, dtype=E5M2), scale, torch.empty(32, 16, dtype=E4M3)
    backward = (x, x, None, "erf", scale, torch.zeros(1), torch.empty(6, 32, dtype=E5M2), *columns, None)
    torch.library.opcheck(gelu_backward_triton, backward, test_utils=("test_faketensor",))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_of_nothing(backend):
    slots = a_table("cpu", known=4.0, y=E4M3, dx=E5M2).slots
    x = torch.empty(0, 32)
    assert gelu_to_fp8(x, None, "erf", slots["y"], backend=backend).rows.shape == (0, 32)
    dx8, y8, _ = gelu_backward_to_fp8(x, x, None, "erf", slots["dx"], slots["y"], None, backend=backend)
    assert dx8.columns.shape == y8.columns.shape == (32, 0)
