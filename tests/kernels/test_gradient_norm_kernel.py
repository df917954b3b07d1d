"""The norm of all gradients: one number whatever their dtypes, places and shapes."""

import pytest
import torch

from neox_hf.kernels import clip_coefficient, gradient_norm, gradient_square_sum

DEVICES = [*([] if torch.cuda.is_available() else ["cpu"]), pytest.param("cuda", marks=pytest.mark.gpu)]
"""Kernels are interpreted on the CPU only where there is no CUDA."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["triton", "torch"]
SHAPES = [(37, 61), (4096,), (), (9001,), (0, 4), (1,)]


def gradients_of(dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]


def truth(gradients: list[torch.Tensor]) -> float:
    return sum(g.double().square().sum().item() for g in gradients) ** 0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_is_the_equation(backend, dtype, device):
    gradients = gradients_of(dtype, device)
    norm = gradient_norm(gradients, backend=backend)
    assert (norm.dtype, norm.shape, norm.device.type) == (torch.float32, (), device)
    assert norm.item() == pytest.approx(truth(gradients), rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_gradients_give_the_same_bits(device):
    gradients = gradients_of(torch.float32, device)
    first = gradient_norm(gradients, backend="triton")
    assert all(torch.equal(first, gradient_norm(gradients, backend="triton")) for _ in range(3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_squares_of_parts_add_up(backend, device):
    gradients = gradients_of(torch.float32, device)
    parts = gradient_square_sum(gradients[:2], backend=backend) + gradient_square_sum(gradients[2:], backend=backend)
    assert parts.sqrt().item() == pytest.approx(truth(gradients), rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_that_are_not_aligned(dtype, device):
    flat = torch.randn(9000, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    gradients = [flat[1:7], flat[7:5001], flat[5001:].view(43, 93).T]
    assert gradient_norm(gradients, backend="triton").item() == pytest.approx(truth(gradients), rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_may_differ(backend, device):
    gradients = [g for dtype in DTYPES for g in gradients_of(dtype, device)]
    assert gradient_norm(gradients, backend=backend).item() == pytest.approx(truth(gradients), rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad, backend, device):
    gradients = gradients_of(torch.bfloat16, device)
    gradients[3][8999] = bad
    assert not gradient_norm(gradients, backend=backend).isfinite()


def test_no_gradients_have_no_norm():
    assert gradient_norm([]) == 0
    assert gradient_norm([torch.zeros(0)], backend="torch") == 0


def test_fp64_is_summed_in_fp64():
    assert gradient_norm([torch.full((4,), 1e-30, dtype=torch.float64)]).item() == pytest.approx(2e-30)


@pytest.mark.parametrize("factor", [0.01, 1.0, 100.0])
def test_coefficient_is_that_of_torch(factor):
    weight = torch.nn.Parameter(torch.zeros(50))
    weight.grad = torch.randn(50) * factor
    expected = weight.grad.clone()
    norm = gradient_norm([weight.grad], backend="torch")
    torch.nn.utils.clip_grad_norm_([weight], 1.0)
    torch.testing.assert_close(expected * clip_coefficient(norm, 1.0), weight.grad, rtol=1e-6, atol=0)


@pytest.mark.gpu
def test_more_elements_than_int32_counts():
    gradient = torch.full((2**31 + 4099,), 0.5, dtype=torch.bfloat16, device="cuda")
    assert gradient_norm([gradient], backend="triton").item() == pytest.approx(0.5 * gradient.numel() ** 0.5, rel=1e-6)


@pytest.mark.gpu
def test_the_host_never_waits():
    gradients = gradients_of(torch.float32, "cuda")
    gradient_norm(gradients)  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradient_norm([g.clone() for g in gradients])
    finally:
        torch.cuda.set_sync_debug_mode(before)
