"""A gradient norm that is not finite stops the run, or skips the step, and never goes unseen."""

import pytest
import torch

from neox_hf.errors import DivergenceError
from neox_hf.training.divergence import GradientGuard


def test_raise_speaks_one_step_later():
    guard = GradientGuard("raise", max_skipped=3)
    assert not guard.must_skip(1, torch.tensor(float("nan")))
    with pytest.raises(DivergenceError, match=r"step 1: the gradient norm is nan.*nan_policy=skip"):
        guard.must_skip(2, torch.tensor(1.0))


def test_settle_judges_the_last_step_before_a_save():
    guard = GradientGuard("raise", max_skipped=3)
    guard.must_skip(1, torch.tensor(1.0))
    guard.settle()
    guard.must_skip(2, torch.tensor(float("inf")))
    with pytest.raises(DivergenceError, match="step 2: the gradient norm is inf"):
        guard.settle()
    guard.settle()


def test_the_norm_is_copied_before_it_can_change():
    guard = GradientGuard("raise", max_skipped=3)
    norm = torch.tensor(1.0)
    guard.must_skip(1, norm)
    norm.fill_(float("nan"))
    guard.settle()


def test_skip_counts_and_stops_after_too_many_in_a_row():
    guard = GradientGuard("skip", max_skipped=3)
    nan = torch.tensor(float("nan"))
    assert [guard.must_skip(step, norm) for step, norm in enumerate([nan, nan, torch.tensor(1.0), nan, nan])] == [
        True,
        True,
        False,
        True,
        True,
    ]
    assert guard.skipped_steps == 4
    with pytest.raises(DivergenceError, match=r"which makes 3 in a row \(train.max_skipped_steps=3\)"):
        guard.must_skip(6, nan)
