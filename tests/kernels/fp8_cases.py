"""Eight-bit casts, GELU and linears against what they stand for, on any device."""

import torch
from torch import Tensor
from torch.nn import functional as F

from neox_hf.kernels.fp8_cast import fp8_cast
from neox_hf.kernels.fp8_format import E4M3, E5M2, largest, padded, quantised_reference
from neox_hf.kernels.fp8_gelu import gelu_backward_to_fp8, gelu_to_fp8
from neox_hf.kernels.fp8_linear import Fp8Linear, fp8_linear, slot_dtypes
from neox_hf.kernels.fp8_mlp import fp8_mlp
from neox_hf.kernels.fp8_scales import Fp8Scales

FORMATS = (E4M3, E5M2)


def a_table(device: str, *, known: float | None = None, **dtypes: torch.dtype) -> Fp8Scales:
    """A table of slots; known: the magnitude that the steps before have shown all of them."""
    table = Fp8Scales(dtypes, device)
    if known is not None:
        for slot in table.slots.values():
            assert not slot.knows()
        table.amax.fill_(known)
        table.advance()
    return table


def same_numbers(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN in the same places."""
    return torch.equal(x.float().nan_to_num(nan=1e9), y.float().nan_to_num(nan=1e9))


def wide_values(rows: int, columns: int, device: str, dtype: torch.dtype) -> Tensor:
    """Finite numbers over twelve powers of ten, zero among them."""
    x = torch.randn(rows, columns, device=device) * torch.logspace(-7, 5, columns, device=device)
    x[0] = 0
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype)


def check_cast(device: str, shape: tuple[int, int], dtype: torch.dtype, form: torch.dtype, known: float | None) -> None:
    """Bytes equal torch's rounding, both ways; amax and sums are those of x."""
    slot = a_table(device, known=known, x=form).slots["x"]
    x = wide_values(*shape, device, dtype)
    cast, sums = fp8_cast(x, slot, sum_dtype=torch.float32, backend="triton")
    expected = quantised_reference(x, 1 / cast.inverse, form)
    rows = shape[0]
    assert same_numbers(cast.rows, expected)
    assert cast.columns.shape == (shape[1], padded(rows))
    assert same_numbers(cast.columns[:, :rows], expected.t())
    assert not cast.columns[:, rows:].float().any()
    assert slot.amax.item() == x.abs().amax().float().item()
    torch.testing.assert_close(sums, x.double().sum(0).float(), rtol=1e-5, atol=1e-5 * float(x.abs().max()))


def check_not_finite(device: str, form: torch.dtype) -> None:
    """NaN and both infinities are NaN, and no magnitude; what is too large is the largest number."""
    slot = a_table(device, known=largest(form), x=form).slots["x"]
    x = torch.full((16, 16), 3.0, device=device)
    x[0, 0], x[1, 1], x[2, 2], x[3, 3], x[4, 4] = torch.nan, torch.inf, -torch.inf, 1e30, -1e30
    cast, _ = fp8_cast(x, slot, backend="triton")
    for made in (cast.rows, cast.columns):
        found = made.float() * cast.inverse
        assert found.diagonal()[:3].isnan().all()
        assert found.isnan().sum() == 3
        assert found[3, 3] == -found[4, 4] == largest(form) * cast.inverse
    assert slot.amax.item() == torch.tensor(1e30).item()


def check_gelu(
    device: str, shape: tuple[int, int], dtype: torch.dtype, form: str, biased: bool, known: float | None
) -> None:
    """Kernels round what the fp64 truth is, to eight bits: to within half a step and what GELU in fp32 is off."""
    slots = a_table(device, known=known, y=E4M3, dx=E5M2).slots
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    bias = torch.randn(shape[1], device=device).to(dtype) if biased else None
    z = (x.double() if bias is None else x.double() + bias.double()).requires_grad_()
    y = F.gelu(z, approximate="none" if form == "erf" else "tanh")
    y.backward(dy.double())
    forward = gelu_to_fp8(x, bias, form, slots["y"], backend="triton")
    dx8, y8, dbias = gelu_backward_to_fp8(
        dy, x, bias, form, slots["dx"], slots["y"], torch.float32 if biased else None, backend="triton"
    )
    rows = shape[0]
    assert_rounded(forward.rows, forward.inverse, y.detach(), dtype)
    assert_rounded(y8.columns[:, :rows].t(), y8.inverse, y.detach(), dtype)
    assert_rounded(dx8.rows, dx8.inverse, z.grad, dtype)
    assert_rounded(dx8.columns[:, :rows].t(), dx8.inverse, z.grad, dtype)
    assert not y8.columns[:, rows:].float().any()
    assert not dx8.columns[:, rows:].float().any()
    assert (dbias is None) is not biased
    if biased:
        torch.testing.assert_close(dbias.double(), z.grad.sum(0), rtol=1e-4, atol=1e-4)
    for slot, truth in ((slots["y"], y), (slots["dx"], z.grad)):
        torch.testing.assert_close(slot.amax.double()[0], truth.abs().max().detach(), rtol=1e-2, atol=0)


def assert_rounded(found: Tensor, inverse: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Each number is within half a step of eight bits of the truth, and within the rounding of `dtype` before."""
    half_step = {E4M3: 2.0**-4, E5M2: 2.0**-3}[found.dtype]
    before = 1e-5 if dtype == torch.float32 else 2.0**-8
    least = {E4M3: 2.0**-9, E5M2: 2.0**-16}[found.dtype] * inverse.double()
    error = (found.double() * inverse.double() - truth).abs()
    assert (error <= truth.abs() * (half_step + before) + 0.5 * least + 1e-5).all()


def relative_error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


def check_linear(device: str, backend: str, dtype: torch.dtype, sizes: tuple[int, int, int], delayed: bool) -> None:
    """Output and gradients are off by what eight bits of independent rounding give, no more.

    A number of e4m3 is off by 2.6 % (rms), of e5m2 by 5.2 %; a sum of products of two by the root of the squares' sum.
    """
    tokens, inputs, outputs = sizes
    table = Fp8Scales(slot_dtypes(["it"]), device)
    state = Fp8Linear(table, "it", backend)
    x = torch.randn(2, tokens, inputs, device=device).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(outputs, inputs, device=device)).to(dtype).requires_grad_()
    bias = torch.randn(outputs, device=device).to(dtype).requires_grad_()
    dy = (1e-5 * torch.randn(2, tokens, outputs, device=device)).to(dtype)
    for _ in range(2 if delayed else 1):
        x.grad = weight.grad = bias.grad = None
        y = fp8_linear(x, weight, bias, state)
        y.backward(dy)
        table.advance()
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (dtype, dtype, dtype)
    exact = [each.detach().double().requires_grad_() for each in (x, weight, bias)]
    truth = F.linear(*exact)
    truth.backward(dy.double())
    assert relative_error(y.detach() - bias.detach(), truth.detach() - exact[2].detach()) < 0.045
    assert relative_error(x.grad, exact[0].grad) < 0.07
    assert relative_error(weight.grad, exact[1].grad) < 0.07
    assert relative_error(bias.grad, exact[2].grad) < 1e-2


def check_mlp(device: str, backend: str, dtype: torch.dtype, sizes: tuple[int, int, int], form: str) -> None:
    """The fused layer, scaled by a step before, is as near to the truth as its eight-bit factors let it be."""
    tokens, hidden, inner = sizes
    table = Fp8Scales(slot_dtypes(["up", "down"]), device)
    states = Fp8Linear(table, "up", backend), Fp8Linear(table, "down", backend)
    x = torch.randn(tokens, hidden, device=device).to(dtype).requires_grad_()
    up, down = ((0.1 * torch.randn(size, device=device)).to(dtype) for size in ((inner, hidden), (hidden, inner)))
    biases = [(0.1 * torch.randn(size, device=device)).to(dtype) for size in (inner, hidden)]
    given = [x, up.requires_grad_(), biases[0].requires_grad_(), down.requires_grad_(), biases[1].requires_grad_()]
    dout = torch.randn(tokens, hidden, device=device).to(dtype)
    for _ in range(2):
        for each in given:
            each.grad = None
        out = fp8_mlp(*given, form, states)
        out.backward(dout)
        table.advance()
    exact = [each.detach().double().requires_grad_() for each in given]
    inside = F.gelu(F.linear(exact[0], *exact[1:3]), approximate="none" if form == "erf" else "tanh")
    truth = F.linear(inside, *exact[3:])
    truth.backward(dout.double())
    assert relative_error(out, truth) < 0.08
    for found, wanted in zip(given, exact, strict=True):
        assert found.grad.dtype == dtype
        assert relative_error(found.grad, wanted.grad) < 0.11
