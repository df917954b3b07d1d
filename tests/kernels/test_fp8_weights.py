"""All weights in one launch: what each alone would be, in memory that stays."""

import pytest
import torch

from neox_hf.kernels import fp8_weights
from neox_hf.kernels.fp8_linear import Fp8Weight, slot_dtypes
from neox_hf.kernels.fp8_scales import Fp8Scales
from neox_hf.kernels.fp8_weights import refresh_weights
from tests.kernels.fp8_cases import same_numbers

SHAPES = [(16, 48), (144, 80), (32, 16)]


def two_casts() -> tuple[Fp8Scales, list[Fp8Weight], list[torch.Tensor]]:
    """Of small weights, with their table."""
    table = a_table_of(2)
    return table, casts_of(table), [torch.randn(shape) for shape in SHAPES[::2]]


def a_table_of(count: int) -> Fp8Scales:
    return Fp8Scales(slot_dtypes(map(str, range(count))), "cpu")


def casts_of(table: Fp8Scales) -> list[Fp8Weight]:
    return [Fp8Weight(slot, "triton") for name, slot in table.slots.items() if name.endswith(".weight")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_what_each_alone_would_be(dtype):
    tables = [a_table_of(len(SHAPES)) for _ in range(2)]
    together, alone = map(casts_of, tables)
    weights = [torch.randn(shape).to(dtype) for shape in SHAPES]
    for step in range(3):
        for weight in weights:
            weight.mul_(1 + step)
        refresh_weights(together, weights)
        for cast, weight in zip(alone, weights, strict=True):
            cast.refresh(weight)
        for found, wanted, weight in zip(together, alone, weights, strict=True):
            made, expected = found.of(weight), wanted.of(weight)
            assert same_numbers(made.rows, expected.rows)
            assert same_numbers(made.columns, expected.columns)
            assert torch.equal(made.inverse, expected.inverse)
        assert torch.equal(tables[0].amax, tables[1].amax)
        for table in tables:
            table.advance()


def test_one_launch_for_all_that_is_known_and_one_plan_while_nothing_moves(monkeypatch):
    table, casts, weights = two_casts()
    launches, plans = [], []
    launch, plan = fp8_weights._launch, fp8_weights._plan
    monkeypatch.setattr(fp8_weights, "_launch", lambda *given: (launches.append(given), launch(*given)))
    monkeypatch.setattr(fp8_weights, "_plan", lambda *given: (plans.append(given), plan(*given))[1])
    counts = []
    for step in range(4):
        if step == 3:
            weights[1] = weights[1].clone()
        refresh_weights(casts, weights)
        counts.append((len(launches), len(plans)))
        table.advance()
    assert counts == [(0, 0), (1, 1), (2, 1), (3, 2)]


def test_what_was_saved_for_a_backward_pass_has_changed():
    table, casts, weights = two_casts()
    refresh_weights(casts, weights)
    table.advance()
    made = casts[0].of(weights[0])
    before = made.rows._version
    refresh_weights(casts, weights)
    assert casts[0].of(weights[0]).rows is made.rows
    assert made.rows._version > before
