"""GPT-NeoX's schedules against the formulas worked by hand."""

import math

import pytest

from neox_hf.training.schedules import DECAY_STYLES, learning_rate

PYTHIA = {"peak": 1e-3, "floor": 1e-4, "warmup_steps": 1430.0, "decay_steps": 143000}


def test_warmup_is_linear_and_starts_above_zero():
    assert learning_rate(0, style="cosine", **PYTHIA) == pytest.approx(1e-3 / 1430)
    assert learning_rate(1, style="cosine", **PYTHIA) == pytest.approx(1e-3 / 1430)
    assert learning_rate(715, style="cosine", **PYTHIA) == pytest.approx(5e-4)
    assert learning_rate(1430, style="cosine", **PYTHIA) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("style", "halfway", "end"),
    [
        ("constant", 1e-3, 1e-3),
        ("linear", 5e-4, 1e-4),
        ("cosine", 5.5e-4, 1e-4),
        ("exponential", 1e-3 * math.exp(-0.3465), 1e-3 * math.exp(-0.693)),
    ],
)
def test_decay(style, halfway, end):
    middle = 1430 + (143000 - 1430) // 2
    assert learning_rate(middle, style=style, **PYTHIA) == pytest.approx(halfway, rel=1e-6)
    assert learning_rate(143000, style=style, **PYTHIA) == pytest.approx(end, rel=1e-6)
    assert learning_rate(200000, style=style, **PYTHIA) == pytest.approx(end, rel=1e-6)


@pytest.mark.parametrize("style", sorted(DECAY_STYLES))
def test_no_warmup_starts_at_the_peak(style):
    rate = learning_rate(0, style=style, peak=1.0, floor=0.0, warmup_steps=0.0, decay_steps=10)
    assert rate == pytest.approx(1.0)


def test_fractional_warmup_never_exceeds_the_peak():
    rates = [
        learning_rate(step, style="linear", peak=1.0, floor=0.0, warmup_steps=0.5, decay_steps=4) for step in range(5)
    ]
    assert max(rates) <= 1.0
    assert rates == sorted(rates, reverse=True)


def test_unknown_style_is_named():
    with pytest.raises(ValueError, match=r"lr_decay_style='cosin' is unknown.*cosine"):
        learning_rate(0, style="cosin", peak=1.0, floor=0.0, warmup_steps=0, decay_steps=1)
