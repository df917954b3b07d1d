"""One step of AdamW by the kernel: the equation in fp64, whatever dtypes, places and shapes the tensors have."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from neox_hf.kernels import AdamWRates, AdamWTensors, TensorTables, adamw_
from neox_hf.kernels.adamw import whole_masters
from neox_hf.kernels.split_fp32 import split_fp32
from tests.kernels.layouts import laid_out

DEVICES = [*([] if torch.cuda.is_available() else ["cpu"]), pytest.param("cuda", marks=pytest.mark.gpu)]
"""Kernels are interpreted on the CPU only where there is no CUDA."""
BACKENDS = ["triton", "torch"]
SHAPES = [(37, 61), (1024,), (), (9001,), (0, 4), (1,)]
STEPS = [0, 1, 7, 100, 5000, 200_000]
RATES = AdamWRates(lr=3e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)


@dataclass(frozen=True)
class Kind:
    """Dtypes of weights, gradients and moments; masters are fp32, or remainders where they are `split`."""

    weights: torch.dtype
    gradients: torch.dtype
    moments: torch.dtype
    masters: bool
    split: bool = False


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
KINDS = {
    "fp32": Kind(F32, F32, F32, masters=False),
    "bf16": Kind(BF16, F32, F32, masters=True),
    "remainders": Kind(BF16, F32, F32, masters=True, split=True),
    "bf16 gradients": Kind(BF16, BF16, F32, masters=True),
    "fp16": Kind(F16, F16, F32, masters=True),
    "pure_bf16": Kind(BF16, BF16, BF16, masters=False),
    "bf16 moments": Kind(F32, BF16, BF16, masters=False),
}


def tensors_of(kind: Kind, device: str, shapes=SHAPES) -> AdamWTensors:
    generator = torch.Generator().manual_seed(0)

    def draw(dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
        return [(torch.randn(shape, generator=generator) * scale).to(device, dtype) for shape in shapes]

    masters = draw(F32) if kind.masters else None
    weights = [m.to(kind.weights) for m in masters] if kind.masters else draw(kind.weights)
    if kind.split:
        masters = [split_fp32(m)[1] for m in masters]
    return AdamWTensors(
        weights=weights,
        gradients=draw(kind.gradients),
        masters=masters,
        exp_avgs=draw(kind.moments, 0.1),
        exp_avg_sqs=[v.abs() for v in draw(kind.moments, 0.1)],
        steps=[torch.tensor(float(step), device=device) for step in STEPS[: len(shapes)]],
    )


def copied(tensors: AdamWTensors) -> AdamWTensors:
    return AdamWTensors(*[None if c is None else [x.clone() for x in c] for c in vars(tensors).values()])


def same_bits(a: AdamWTensors, b: AdamWTensors) -> bool:
    return all(torch.equal(x, y) for x, y in pairs(a, b))


def pairs(a: AdamWTensors, b: AdamWTensors) -> Iterator[tuple[Tensor, Tensor]]:
    for one, other in zip(a.columns, b.columns, strict=True):
        yield from zip(one, other, strict=True)


def whole(tensors: AdamWTensors) -> AdamWTensors:
    """With masters put together."""
    return AdamWTensors(**{**vars(tensors), "masters": whole_masters(tensors)})


def truth(tensors: AdamWTensors, rates: AdamWRates, factor: float = 1.0) -> AdamWTensors:
    """The equation, written out in fp64."""
    results: dict[str, list[Tensor]] = {"w": [], "m": [], "v": []}
    masters = whole_masters(tensors)
    own = tensors.weights if masters is None else masters
    for w, g, m, v, step in zip(
        own, tensors.gradients, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.steps, strict=True
    ):
        w, g, m, v, t = w.double(), g.double() * factor, m.double(), v.double(), step.item() + 1
        m = rates.beta1 * m + (1 - rates.beta1) * g
        v = rates.beta2 * v + (1 - rates.beta2) * g * g
        w = w - rates.lr * rates.weight_decay * w
        hats = m / (1 - rates.beta1**t), v / (1 - rates.beta2**t)
        results["w"].append(w - rates.lr * hats[0] / (hats[1].sqrt() + rates.eps))
        results["m"].append(m)
        results["v"].append(v)
    masters = None if masters is None else results["w"]
    steps = [step + 1 for step in tensors.steps]
    return AdamWTensors(results["w"], tensors.gradients, masters, results["m"], results["v"], steps)


def rounding(dtype: torch.dtype, device: str) -> float:
    """The largest relative error of one rounding; the interpreter cuts bf16 off, where hardware rounds to nearest."""
    return torch.finfo(dtype).eps * (1.0 if dtype == BF16 and device == "cpu" else 0.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_is_the_equation(backend, kind, device):
    tensors = tensors_of(KINDS[kind], device)
    expected = truth(tensors, RATES, factor=0.25)
    adamw_(tensors, RATES, factor=torch.tensor(0.25, device=device), backend=backend)
    for ours, exact in pairs(whole(tensors), expected):
        allowed = (rounding(ours.dtype, device) * 1.01 + 3e-7) * exact.double().abs() + 1e-7
        assert ((ours.double() - exact.double()).abs() <= allowed).all(), f"{ours.dtype} {tuple(ours.shape)}"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_no_further_from_the_truth_than_torch(kind):
    tensors = tensors_of(KINDS[kind], "cuda", [(1 << 20,), (4097, 511), (3,)])
    torchs, exact = copied(tensors), truth(tensors, RATES)
    adamw_(tensors, RATES, backend="triton")
    adamw_(torchs, RATES, backend="torch")
    for (ours, right), (theirs, _) in zip(pairs(whole(tensors), exact), pairs(whole(torchs), exact), strict=True):
        errors = [(x.double() - right.double()).abs() for x in (ours, theirs)]
        assert errors[0].max() <= 1.05 * errors[1].max() + 2e-7 * right.double().abs().max()
        assert errors[0].mean() <= 1.05 * errors[1].mean() + 1e-8


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["bf16", "remainders", "pure_bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flag", [True, 1.0])
def test_a_skipped_step_writes_nothing(flag, backend, kind, device):
    tensors = tensors_of(KINDS[kind], device)
    tensors.gradients[0][0, 0] = float("nan")
    if tensors.masters:
        tensors.weights[0][1, 1] = 5.0  # which no master rounds to: it would show
    before = copied(tensors)
    before.gradients[0][0, 0] = 0  # NaN is unlike itself
    adamw_(tensors, RATES, skip=torch.tensor(flag, device=device), backend=backend)
    tensors.gradients[0][0, 0] = 0
    assert same_bits(tensors, before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("flag", [False, 0.0])
def test_a_flag_that_is_not_set_changes_nothing(flag, device):
    tensors = tensors_of(KINDS["bf16"], device)
    plain = copied(tensors)
    adamw_(tensors, RATES, skip=torch.tensor(flag, device=device), backend="triton")
    adamw_(plain, RATES, factor=torch.tensor(1.0, device=device), backend="triton")
    assert same_bits(tensors, plain)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_remainders_are_the_same_masters(backend, device):
    """Bit for bit, over several steps, and the same weights."""
    kept, halved = (tensors_of(KINDS[kind], device) for kind in ("bf16", "remainders"))
    for _ in range(3):
        for tensors in (kept, halved):
            adamw_(tensors, RATES, backend=backend)
    assert all(torch.equal(m, n) for m, n in zip(kept.masters, whole_masters(halved), strict=True))
    rounded = [m.bfloat16() for m in kept.masters]
    assert all(torch.equal(w, r) for w, r in zip(halved.weights, rounded, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("skip", [False, True])
def test_gradients_are_zeroed_in_either_case(skip, backend, device):
    tensors = tensors_of(KINDS["bf16"], device)
    tensors.gradients[0] = tensors.gradients[0].T.contiguous().T
    plain = copied(tensors)
    flag = torch.tensor(skip, device=device)
    adamw_(tensors, RATES, skip=flag, zero_gradients=True, backend=backend)
    adamw_(plain, RATES, skip=flag, backend=backend)
    assert not any(g.any() for g in tensors.gradients)
    assert all(torch.equal(a, b) for a, b in zip(tensors.weights, plain.weights, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "pure_bf16"])
def test_torch_may_be_given_tensors_that_lie_in_memory_otherwise_than_the_weight(kind, device):
    tensors = tensors_of(KINDS[kind], device)
    plain = copied(tensors)
    for column in (tensors.gradients, tensors.exp_avgs):
        column[0] = column[0].T.contiguous().T
    adamw_(tensors, RATES, backend="torch")
    adamw_(plain, RATES, backend="torch")
    assert same_bits(tensors, plain)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("home", ["cpu", "device"])
def test_a_rate_may_be_a_tensor(home, backend, device):
    tensors = tensors_of(KINDS["bf16"], device)
    plain = copied(tensors)
    lr = torch.tensor(RATES.lr, device=device if home == "device" else "cpu")
    adamw_(tensors, AdamWRates(lr, *list(vars(RATES).values())[1:]), backend=backend)
    adamw_(plain, RATES, backend=backend)
    for ours, theirs in pairs(tensors, plain):
        torch.testing.assert_close(ours, theirs, rtol=1e-6 if ours.dtype == F32 else 1e-2, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["bf16", "remainders", "pure_bf16"])
def test_views_that_are_not_aligned_and_what_lies_around_them(kind, device):
    whole = tensors_of(KINDS[kind], device, [(9001,)])
    parts = AdamWTensors(*[c and [c[0].clone()] for c in vars(whole).values()])
    views = [
        c and ([c[0][1:1500], c[0][1500:9000]] if c[0].ndim else [c[0], c[0].clone()]) for c in vars(parts).values()
    ]
    adamw_(AdamWTensors(*views), RATES, backend="triton")
    before = copied(whole)
    adamw_(whole, RATES, backend="triton")
    for view, aligned, untouched in zip(parts.columns, whole.columns, before.columns, strict=True):
        if view[0].ndim:
            assert torch.equal(view[0][1:9000], aligned[0][1:9000])
            assert torch.equal(view[0][[0, -1]], untouched[0][[0, -1]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_may_differ(backend, device):
    kinds = [KINDS["fp32"], KINDS["pure_bf16"]]
    parts = [tensors_of(kind, device) for kind in kinds]
    alone = [copied(part) for part in parts]
    both = [c and [*c, *d] for c, d in zip(*(vars(part).values() for part in parts), strict=True)]
    adamw_(AdamWTensors(*both), RATES, backend=backend)
    for part, expected in zip(parts, alone, strict=True):
        adamw_(expected, RATES, backend=backend)
        assert same_bits(part, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_step(backend):
    adamw_(AdamWTensors([], [], None, [], [], []), RATES, backend=backend)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_with_gaps_are_refused(device):
    tensors = tensors_of(KINDS["fp32"], device, [(4, 6)])
    gaps = AdamWTensors(*[c and [x.T if x.ndim else x for x in c] for c in vars(tensors).values()])
    with pytest.raises(ValueError, match=r"wants all contiguous.*shape \(6, 4\) with strides \(1, 6\) on .*torch"):
        adamw_(gaps, RATES, backend="triton")
    adamw_(gaps, RATES, backend="torch")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", ["transposed", "stepped", "cut out", "expanded", "fp64"])
def test_gradients_may_lie_as_they_like_and_be_of_any_dtype(change, backend, device):
    tensors = tensors_of(KINDS["bf16"], device, [(37, 61), (9,)])
    if change == "fp64":
        given = [g.double() for g in tensors.gradients]
    else:
        given = [laid_out(change, g) for g in tensors.gradients]
    tensors = AdamWTensors(**{**vars(tensors), "gradients": given})
    plain = copied(AdamWTensors(**{**vars(tensors), "gradients": [g.float().contiguous() for g in given]}))
    for each in (tensors, plain):
        adamw_(each, RATES, zero_gradients=change != "expanded", backend=backend)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in pairs(tensors, plain))


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_kernel_does_not_read_is_refused(device):
    tensors = tensors_of(KINDS["fp32"], device, [(4, 6)])
    wide = AdamWTensors(**{**vars(tensors), "exp_avgs": [m.double() for m in tensors.exp_avgs]})
    with pytest.raises(ValueError, match=r"reads torch\.float32, .*, not torch\.float64; use kernels='torch'"):
        adamw_(wide, RATES, backend="triton")
    whole_steps = AdamWTensors(**{**vars(tensors), "steps": [t.long() for t in tensors.steps]})
    with pytest.raises(ValueError, match=r"was given steps of torch\.int64; its kernel counts in fp32"):
        adamw_(whole_steps, RATES, backend="triton")
    short = AdamWTensors(**{**vars(tensors), "exp_avgs": [m[:3] for m in tensors.exp_avgs]})
    with pytest.raises(ValueError, match=r"of shape \(4, 6\) has something of shape \(3, 6\) beside it"):
        adamw_(short, RATES, backend="triton")


def test_fp64_stays_fp64():
    tensors = tensors_of(Kind(torch.float64, torch.float64, torch.float64, masters=False), "cpu")
    expected = truth(tensors, RATES)
    adamw_(tensors, RATES)
    for ours, exact in pairs(tensors, expected):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
def test_the_host_never_waits():
    tensors, tables = tensors_of(KINDS["bf16"], "cuda"), TensorTables()
    factor, skip = torch.tensor(0.5, device="cuda"), torch.tensor(False, device="cuda")
    adamw_(tensors, RATES, factor=factor, skip=skip, tables=tables)  # compiles
    tensors.gradients[:] = [g.clone() for g in tensors.gradients]  # have moved
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        adamw_(tensors, RATES, factor=factor, skip=skip, tables=tables)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
def test_a_graph_repeats_the_step():
    tensors, tables = tensors_of(KINDS["bf16"], "cuda"), TensorTables()
    lr, eager = torch.tensor(RATES.lr, device="cuda"), tensors_of(KINDS["bf16"], "cuda")
    rates = AdamWRates(lr, *list(vars(RATES).values())[1:])
    adamw_(tensors, rates, tables=tables)  # compiles, and makes the table
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw_(tensors, rates, tables=tables)
    for step in range(3):
        lr.fill_(RATES.lr * (step + 1))
        if step:
            graph.replay()
        adamw_(eager, rates)
    assert same_bits(tensors, eager)
