"""The benchmark on a device: every op is timed by ours and by torch, captured where it says so."""

import pytest
import torch

from scripts.bench.cases import CASES
from scripts.bench.floors import Shapes
from scripts.bench.measure_ops import time_case
from scripts.bench.timing import op_ms

pytestmark = pytest.mark.gpu

SMALL = Shapes(batch=2, sequence=256, heads=4, head_size=64, inner=1024, vocabulary=1000, rotary=16)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_op_can_be_captured(case):
    for row in time_case(case, SMALL, torch.device("cuda"), ["ours", "torch"]):
        assert "failed" not in row, row
        assert row["how"] == "graph", row
        # Backward has nothing to do where it hands on what comes (a sum), or finds gradients made (the head): then the
        # two differ as two clocks do.
        assert 0 < row["forward_ms"] <= 1.1 * row["both_ms"]


def test_both_ways_to_take_a_time_agree():
    x = torch.randn(4096, 4096, device="cuda")
    out = torch.empty_like(x)
    captured, queued = (op_ms(lambda: torch.mm(x, x, out=out), captured=captured) for captured in (True, False))
    assert (captured.how, queued.how) == ("graph", "queue")
    assert queued.ms == pytest.approx(captured.ms, rel=0.25)


def test_what_asks_the_device_is_timed_without_a_graph():
    x = torch.randn(1024, 1024, device="cuda")
    assert op_ms(lambda: x.sum().item(), captured=False).ms > 0
