"""The benchmark's table of ops: ours is what torch is, floors are those of the goals, and times are taken."""

import pytest
import torch

from scripts.bench.cases import CASES
from scripts.bench.floors import Shapes, Work
from scripts.bench.inputs import Inputs, Random
from scripts.bench.liger import NotInstalled, require
from scripts.bench.measure_ops import bounds, check_accuracy, error, implementations, time_case
from scripts.bench.ops import rotary_inputs
from scripts.bench.optimizer_ops import (
    BYTES,
    NARROW,
    WIDE,
    check_adamw,
    optimizer_bounds,
    parameter_shapes,
    time_optimizer,
)
from scripts.bench.sizes import SIZES
from scripts.bench.timing import ROUNDS, settled_median
from tests.scripts.bench_cases import TINY

CPU = torch.device("cpu")
BY_NAME = {case.name: case for case in CASES}
SHAPES = [torch.Size(shape) for shape in ((5, 7), (3,))]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", [case.name for case in CASES if case.checked])
def test_ours_is_what_torch_is(name, backend):
    row = check_accuracy(BY_NAME[name], TINY, CPU, torch.float32, backend)
    assert max(row["torch"], row["ours"]) < 1e-6
    assert row["good"] == (row["ours"] <= 1.05 * row["torch"] + 1e-7)
    assert (row["op"], row["dtype"]) == (name, "float32")


def test_error_is_the_worst_of_all_tensors():
    truth = (torch.ones(4).double(), torch.ones(2).double())
    assert error((torch.ones(4), torch.ones(2)), truth) == 0
    assert error((torch.ones(4), 1.5 * torch.ones(2)), truth) == pytest.approx(0.5)


# ms forward, and forward and backward, from shared arithmetic on an H200: bytes at 4285 GB/s, products at 675 TFLOP/s.
FLOORS = {
    "layer norm": (0.0313, 0.078),
    "dual layer norm": (0.047, 0.110),
    "residual + dual layer norm": (0.094, 0.172),
    "partial rotary": (0.0157, 0.0313),
    "causal attention": (0.204, 0.713),
    "GELU": (0.125, 0.313),
    "bias + GELU": (0.125, 0.313),
    "linear + bias + GELU": (0.815, 2.44),
    "cross-entropy": (None, 0.769),
    "linear + cross-entropy": (None, 14.27),
}


@pytest.mark.parametrize("name", FLOORS)
def test_floors(name):
    found = bounds(BY_NAME[name], Shapes())
    forward, both = FLOORS[name]
    assert found["both_floor_ms"] == pytest.approx(both, rel=0.01)
    assert forward is None or found["forward_floor_ms"] == pytest.approx(forward, rel=0.01)


def test_a_target_is_above_its_floor():
    for case in CASES:
        found = bounds(case, Shapes())
        for part in ("forward", "both"):
            target = found[f"{part}_target_ms"]
            assert target is None or target > found[f"{part}_floor_ms"], case.name


def test_the_longer_of_bytes_and_products_is_the_floor():
    assert Work(moved=4285e6).floor_ms == pytest.approx(1.0)
    assert Work(moved=4285e6, flops=2 * 675e9).floor_ms == pytest.approx(2.0)


def test_optimizer_floors():
    found = {row["op"]: row for row in optimizer_bounds(parameter_shapes(SIZES["1.4b"].config()))}
    assert found[NARROW]["both_floor_ms"] == pytest.approx(4.62, rel=0.01)
    assert found[WIDE]["both_floor_ms"] == pytest.approx(9.24, rel=0.01)
    assert all(row["both_target_ms"] is None or row["both_target_ms"] > row["both_floor_ms"] for row in found.values())


def test_inputs_are_the_same_each_time():
    first, second = (CASES[0].make(TINY, Random(CPU, torch.bfloat16)).arguments for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rotary_turns_projection_and_gradients_in_place():
    case = BY_NAME["partial rotary"]
    inputs = rotary_inputs(TINY, Random(CPU, torch.float32), one_buffer=True)
    before = [inputs.arguments[0].detach().clone(), inputs.gradients[0].clone()]
    inputs.forward_and_backward(lambda *given: case.ours(*given, backend="triton"))
    assert not torch.equal(inputs.arguments[0], before[0])
    assert not torch.equal(inputs.gradients[0], before[1])


def test_gradients_take_the_dtype_of_the_output():
    inputs = Inputs((torch.ones(2, dtype=torch.bfloat16, requires_grad=True),), (torch.ones(2),))
    _, gradients = inputs.forward_and_backward(lambda x: 3 * x)
    assert gradients[0].tolist() == [3, 3]


def test_times_of_each_implementation_as_they_come():
    rows = list(time_case(BY_NAME["layer norm"], TINY, CPU, ["ours", "torch", "liger"]))
    assert [row["by"] for row in rows] == ["ours", "torch", "liger"]
    assert all(row["forward_ms"] > 0 and row["both_ms"] > 0 and row["how"] == "host" for row in rows[:2])


def test_an_op_that_fails_does_not_end_the_others(monkeypatch):
    broken = {"ours": lambda: lambda *given: 1 / torch.tensor([1, 2]) @ torch.ones(3), "torch": lambda: torch.relu}
    monkeypatch.setattr("scripts.bench.measure_ops.implementations", lambda *_: broken)
    rows = list(time_case(BY_NAME["GELU"], TINY, CPU, ["ours", "torch"]))
    assert rows[0]["failed"].startswith("RuntimeError")
    assert rows[1]["forward_ms"] > 0


def test_liger_that_is_missing_is_told(monkeypatch):
    monkeypatch.setattr("scripts.bench.liger.find_spec", lambda name: None)
    with pytest.raises(NotInstalled, match="liger-kernel is not installed"):
        require()
    row = list(time_case(BY_NAME["layer norm"], TINY, CPU, ["liger"]))
    assert row == [{"op": "layer norm", "by": "liger", "failed": "liger-kernel is not installed"}]


def test_only_ops_that_liger_has_name_it():
    having = {case.name for case in CASES if "liger" in implementations(case, "auto")}
    assert having == {
        "layer norm",
        "cross-entropy",
        "linear + cross-entropy",
        "linear + cross-entropy, fp32 weight gradient",
    }


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_adamw_is_torchs(backend):
    row = check_adamw(SHAPES, CPU, torch.float32, backend)
    assert max(row["torch"], row["ours"]) < 1e-6


def test_times_of_the_optimizer():
    rows = list(time_optimizer(SHAPES, CPU))
    assert {row["op"] for row in rows} == set(BYTES)
    assert all(row["both_ms"] > 0 for row in rows)
    assert [row["by"] for row in rows].count("ours") == 5


def test_rounds_before_the_clock_has_settled_do_not_count(monkeypatch):
    now = 0.0
    monkeypatch.setattr("scripts.bench.timing.time.perf_counter", lambda: now)

    def one_round():
        nonlocal now
        now += 0.3
        return 2.0 if now < 1.0 else 1.0

    assert settled_median(one_round, 1.0) == 1.0
    assert now == pytest.approx(0.3 * (4 + ROUNDS))


@pytest.mark.parametrize("name", [case.name for case in CASES if not case.checked])
def test_what_cannot_be_checked_is_of_the_right_size(name):
    """Chance and eight bits move each element, but hardly the norm of many."""
    case = BY_NAME[name]
    shapes = Shapes(batch=2, sequence=32, heads=2, head_size=32, inner=256)
    found, wanted = (
        case.make(shapes, Random(CPU, torch.bfloat16)).forward_and_backward(op)
        for op in (lambda *given: case.ours(*given, backend="auto"), case.torch)
    )
    for ours, torchs in zip((*found[0], *found[1]), (*wanted[0], *wanted[1]), strict=True):
        assert ours.shape == torchs.shape
        assert float(ours.detach().norm()) == pytest.approx(float(torchs.detach().norm()), rel=0.05)
