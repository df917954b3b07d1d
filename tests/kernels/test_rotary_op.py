"""Partial rotary embedding on the fused projection."""

import pytest
import torch

from neox_hf.kernels import rotary


def angles(length, rotated, batch=1):
    frequencies = 10000.0 ** -(torch.arange(0, rotated, 2).double() / rotated)
    positions = torch.arange(length).double() + 7 * torch.arange(batch).double()[:, None]
    return positions[..., None] * frequencies


def written_out(qkv, cos, sin):
    """As complex numbers: (a + ib) e^{it}."""
    half = cos.shape[-1]
    turned = []
    for x in (qkv[..., 0, :], qkv[..., 1, :]):
        turn = torch.complex(cos, sin)[:, :, None, :]
        z = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
        turned.append(torch.cat((z.real, z.imag, x[..., 2 * half :]), dim=-1))
    return tuple(x.transpose(1, 2) for x in (*turned, qkv[..., 2, :]))


@pytest.mark.parametrize(("head_size", "rotated"), [(32, 8), (80, 20), (96, 96), (16, 2)])
@pytest.mark.parametrize("batch_of_angles", [1, 2])
def test_rotates_queries_and_keys_alone(assert_follows, head_size, rotated, batch_of_angles):
    torch.manual_seed(0)
    t = angles(6, rotated, batch_of_angles).float()
    qkv = torch.randn(2, 6, 3, 3, head_size)

    def ours(x):
        return rotary(x, t.cos(), t.sin())

    def truth(x):
        return written_out(x, t.double().cos(), t.double().sin())

    assert_follows(ours, truth, (qkv,), 1e-5)


def test_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    t = angles(12, 16).float()
    qkv = torch.randn(1, 1, 1, 3, 16).expand(1, 12, 1, 3, 16)
    query, key, _ = rotary(qkv, t.cos(), t.sin())
    scores = (query @ key.transpose(-1, -2))[0, 0]
    for distance in range(-11, 12):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4)


def test_bfloat16_rounds_once():
    torch.manual_seed(0)
    t = angles(64, 16).float()
    qkv = torch.randn(1, 64, 2, 3, 16).to(torch.bfloat16)
    exact = rotary(qkv.double(), t.cos(), t.sin())
    for found, wanted in zip(rotary(qkv, t.cos(), t.sin()), exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, wanted.float().to(torch.bfloat16))


def test_angles_wider_than_a_head_are_refused():
    with pytest.raises(ValueError, match="rotary width 24 is over the head size 16"):
        rotary(torch.randn(1, 4, 2, 3, 16), torch.ones(1, 4, 12), torch.zeros(1, 4, 12))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_rotates_once():
    weight = torch.randn(24, 8)
    cos, sin = torch.rand(1, 4, 2), torch.rand(1, 4, 2)

    def rotated(x):
        return sum(rotary((x @ weight.t()).view(1, 4, 1, 3, 8), cos, sin, backend="triton"))

    with torch.no_grad():
        traced = torch.jit.trace(rotated, torch.randn(1, 4, 8), check_trace=False)
        x = torch.randn(1, 4, 8)
        torch.testing.assert_close(traced(x), rotated(x))
