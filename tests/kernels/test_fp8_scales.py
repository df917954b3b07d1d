"""Scales from steps before: powers of two that leave room, remember, forget and survive a checkpoint."""

import math

import pytest
import torch

from neox_hf.kernels.fp8_cast import fp8_cast
from neox_hf.kernels.fp8_format import E4M3, E5M2, mantissa
from neox_hf.kernels.fp8_product import reason_against_device
from neox_hf.kernels.fp8_scales import Fp8Scales, scale_for
from tests.kernels.fp8_cases import a_table


@pytest.mark.parametrize("limit", [448.0, 57344.0])
@pytest.mark.parametrize("margin", [0, 1])
def test_scales_are_powers_of_two_that_fit(limit, margin):
    magnitude = torch.cat([torch.logspace(-25, 28, 99), torch.tensor([limit, limit / 2, 1.0])])
    scale = scale_for(magnitude, limit, margin)
    assert torch.equal(scale.log2(), scale.log2().round())
    filled = magnitude.double() * scale.double() * 2**margin / limit
    assert (filled <= 1).all()
    assert (filled > 0.5).all()


def test_what_says_nothing_has_scale_one():
    magnitude = torch.tensor([0.0, torch.nan, torch.inf])
    assert scale_for(magnitude, 448.0).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("magnitude", [1e-45, 3e38])
def test_extremes_have_scales_with_inverses(magnitude):
    scale = scale_for(torch.tensor([magnitude]), 448.0, 1)
    assert 0 < float(scale) < math.inf
    assert float(1 / scale) * float(scale) == 1


def test_the_largest_of_the_history_counts_until_it_is_forgotten():
    table = Fp8Scales({"x": E4M3}, "cpu", history=3, margins={E4M3: 0})
    seen = []
    for value in (1.0, 8.0, 1.0, 1.0, 1.0):
        fp8_cast(torch.full((16, 16), value), table.slots["x"])
        table.advance()
        seen.append(float(table.slots["x"].scale))
    assert seen == [256, 32, 32, 32, 256]


def test_a_tensor_of_zeros_leaves_its_scale():
    table = a_table("cpu", known=1.0, x=E4M3)
    before = float(table.slots["x"].scale)
    for _ in range(20):
        fp8_cast(torch.zeros(16, 16), table.slots["x"])
        table.advance()
    assert float(table.slots["x"].scale) == before


def test_one_that_is_not_finite_leaves_no_trace():
    table = a_table("cpu", known=1.0, x=E4M3)
    before = float(table.slots["x"].scale)
    for value in (torch.nan, torch.inf):
        fp8_cast(torch.full((16, 16), value), table.slots["x"])
        table.advance()
    assert float(table.slots["x"].scale) == before


def test_the_first_step_is_scaled_by_its_own_values_whatever_their_size():
    table = Fp8Scales({"x": E5M2}, "cpu")
    for size in (1e-9, 1.0, 1e6):
        cast, _ = fp8_cast(torch.full((16, 16), size), table.slots["x"])
        torch.testing.assert_close(cast.dequantised(), torch.full((16, 16), size), rtol=0.126, atol=0)


def test_a_slot_first_used_later_has_its_own_first_step():
    table = Fp8Scales({"x": E5M2, "late": E5M2}, "cpu")
    fp8_cast(torch.ones(16, 16), table.slots["x"])
    table.advance()
    cast, _ = fp8_cast(torch.full((16, 16), 1e-9), table.slots["late"])
    assert cast.dequantised().min() > 0
    assert not table.slots["late"].knows()
    assert table.slots["x"].knows()


def test_ranks_agree_on_the_largest():
    table = Fp8Scales({"x": E4M3, "y": E4M3}, "cpu", margins={E4M3: 0})
    fp8_cast(torch.ones(16, 16), table.slots["x"])
    table.advance(lambda amax: amax.copy_(torch.maximum(amax, torch.tensor([4.0, 2.0]))))
    assert table.scale.tolist() == [64, 128]


def test_a_step_that_grows_is_clamped_and_learned():
    table = a_table("cpu", known=1.0, x=E4M3)
    x = torch.full((16, 16), 100.0)
    first, _ = fp8_cast(x, table.slots["x"])
    assert first.dequantised().max() == 448 / float(table.slots["x"].scale)
    table.advance()
    assert fp8_cast(x, table.slots["x"])[0].dequantised().unique().tolist() == [96.0]  # 100, in steps of 8, to even


@pytest.mark.parametrize(("dtype", "times"), [(E4M3, 4), (E5M2, 64)])
def test_a_step_unlike_those_before_has_room(dtype, times):
    """Gradients of one odd batch that were clamped to what was usual sent a training run elsewhere."""
    table = a_table("cpu", known=1.0, x=dtype)
    x = torch.linspace(-times, times, 256).view(16, 16)
    found = fp8_cast(x, table.slots["x"])[0].dequantised()
    assert ((found - x).abs() <= x.abs() * 2.0 ** -(mantissa(dtype) + 1)).all()


def test_what_room_takes_from_small_numbers_nobody_misses():
    table = a_table("cpu", known=1.0, x=E5M2)
    x = torch.full((16, 16), 2.0**-23)
    assert torch.equal(fp8_cast(x, table.slots["x"])[0].dequantised(), x)


def test_state_survives_under_other_names_and_orders():
    table = Fp8Scales({"x": E4M3, "y": E5M2}, "cpu", history=4)
    for value in (1.0, 3.0):
        fp8_cast(torch.full((16, 16), value), table.slots["x"])
        fp8_cast(torch.full((16, 16), 1e-6 * value), table.slots["y"])
        table.advance()
    state = table.state_dict()
    assert {name: kept.shape for name, kept in state.items()} == {"x": (4,), "y": (4,)}
    other = Fp8Scales({"new": E4M3, "y": E5M2, "x": E4M3}, "cpu", history=4)
    other.load_state_dict(state)
    for name in ("x", "y"):
        assert torch.equal(other.slots[name].scale, table.slots[name].scale)
        assert torch.equal(other.slots[name].inverse, table.slots[name].inverse)
        assert other.slots[name].knows()
    assert not other.slots["new"].knows()
    assert torch.equal(other.state_dict()["x"], state["x"])


def test_a_history_of_another_length_is_refused():
    table = Fp8Scales({"x": E4M3}, "cpu", history=4)
    with pytest.raises(ValueError, match="x were saved over 3 steps, but this run keeps 4"):
        table.load_state_dict({"x": torch.ones(3)})


def test_forgetting():
    table = a_table("cpu", known=1.0, x=E4M3)
    table.recalibrate()
    assert not table.slots["x"].knows()
    assert not table.history.any()


def test_a_graph_may_hold_it_once_all_that_is_used_is_known():
    table = Fp8Scales({"x": E4M3, "late": E4M3, "never": E4M3}, "cpu")
    assert not table.capturable
    fp8_cast(torch.ones(16, 16), table.slots["x"])
    assert not table.capturable
    table.advance()
    assert table.capturable
    fp8_cast(torch.ones(16, 16), table.slots["late"])
    assert not table.capturable
    table.advance()
    assert table.capturable
    scale = table.slots["x"].scale.data_ptr()
    table.advance()
    assert table.slots["x"].scale.data_ptr() == scale
    table.recalibrate()
    assert not table.capturable


@pytest.mark.parametrize(
    ("capability", "reason"), [((9, 0), None), ((8, 9), None), ((8, 6), "8.6, and eight bits want")]
)
def test_which_devices_multiply_in_eight_bits(monkeypatch, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = reason_against_device(torch.device("cuda"))
    assert found is None if reason is None else found.startswith(f"a GPU has CUDA capability {reason} 8.9 or above")
    assert reason_against_device(torch.device("cpu")) is None
