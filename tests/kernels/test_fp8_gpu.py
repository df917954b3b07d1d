"""Eight bits on a GPU: its own rounding against torch's, its products against the truth, no word to the host."""

import pytest
import torch

from neox_hf.kernels.fp8_cast import fp8_cast
from neox_hf.kernels.fp8_format import E4M3, E5M2
from neox_hf.kernels.fp8_linear import Fp8Linear, slot_dtypes
from neox_hf.kernels.fp8_mlp import fp8_mlp
from neox_hf.kernels.fp8_product import add_fp8_product_, fp8_product, fp8_product_reference
from neox_hf.kernels.fp8_scales import Fp8Scales
from neox_hf.kernels.fp8_weights import refresh_weights
from neox_hf.kernels.weight_gradient import SumInGrad, sum_in
from tests.kernels.fp8_cases import (
    FORMATS,
    a_table,
    check_cast,
    check_gelu,
    check_linear,
    check_mlp,
    check_not_finite,
    relative_error,
)

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BACKENDS = ["torch", "triton"]
SHAPES = [(4096, 2048), (2049, 1040), (77, 1001), (5, 64)]
"""Whole tiles; a row and some columns too many; no vectors of 16 bytes; one small."""


@pytest.mark.parametrize("known", [None, 1e4])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_cast(shape, dtype, form, known):
    check_cast("cuda", shape, dtype, form, known)


@pytest.mark.parametrize("form", FORMATS)
def test_every_half_precision_number_rounds_as_torch_rounds(form):
    x = torch.arange(2**16, dtype=torch.int32, device="cuda").to(torch.int16).view(torch.bfloat16).view(256, 256)
    x = torch.where(x.abs() <= torch.finfo(form).max, x, 0)
    slot = a_table("cuda", known=1.0, x=form).slots["x"]
    slot.scale.fill_(1)
    found = fp8_cast(x, slot, backend="triton")[0].rows
    assert torch.equal(found.float(), x.to(form).float())


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_not_finite(form):
    check_not_finite("cuda", form)


@pytest.mark.parametrize("known", [None, 8.0])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("form", ["erf", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu(shape, dtype, form, biased, known):
    check_gelu("cuda", shape, dtype, form, biased, known)


@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("sizes", [(256, 512, 1024), (37, 48, 64), (1, 16, 16)])
def test_products(sizes, fast, dtype, formats):
    rows, columns, depth = sizes
    a = torch.randn(rows, depth, device="cuda").to(formats[0])
    b = torch.randn(columns, depth, device="cuda").to(formats[1])
    bias = torch.randn(columns, device="cuda").to(dtype)
    inverse = torch.full((1,), 0.5, device="cuda"), torch.full((1,), 0.25, device="cuda")
    found = fp8_product(a, b, *inverse, dtype, bias=bias, fast=fast)
    truth = fp8_product_reference(a.double(), b.double(), *inverse, torch.float32, bias)
    assert found.dtype == dtype
    assert relative_error(found, truth.double()) < (4e-3 if dtype == torch.bfloat16 else 2e-3)


def test_sums_of_products():
    a, b = torch.randn(64, 512, device="cuda").to(E5M2), torch.randn(32, 512, device="cuda").to(E4M3)
    one = torch.ones(1, device="cuda")
    truth = a.double() @ b.double().t()
    total = torch.full((64, 32), torch.nan, device="cuda")
    add_fp8_product_(total, a, b, one, one, keep=False)
    assert relative_error(total, truth) < 1e-3
    add_fp8_product_(total, a, b, one, one)
    assert relative_error(total, 2 * truth) < 1e-3


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(1024, 2048, 1024), (37, 64, 48)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_how_near_a_linear_is(backend, sizes, dtype, delayed):
    check_linear("cuda", backend, dtype, sizes, delayed)


@pytest.mark.parametrize("form", ["erf", "tanh"])
@pytest.mark.parametrize("sizes", [(2048, 512, 2048), (37, 32, 64)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_how_near_the_feed_forward_layer_is(backend, sizes, form):
    check_mlp("cuda", backend, torch.bfloat16, sizes, form)


def a_layer(backend: str) -> tuple[Fp8Scales, tuple[Fp8Linear, Fp8Linear], list[torch.Tensor]]:
    table = Fp8Scales(slot_dtypes(["up", "down"]), "cuda")
    sizes = (1024, 256), (1024,), (256, 1024), (256,)
    parameters = [torch.randn(size, device="cuda").mul(0.05).bfloat16().requires_grad_() for size in sizes]
    for parameter in parameters[::2]:
        parameter.grad_dtype = torch.float32
        sum_in(parameter, SumInGrad())
    return table, tuple(Fp8Linear(table, name, backend) for name in ("up", "down")), parameters


def test_all_weights_in_one_launch_are_what_each_alone_would_be():
    table, (up, down), parameters = a_layer("triton")
    casts, weights = (up.weight, down.weight), parameters[::2]
    refresh_weights(casts, weights)
    table.advance()
    refresh_weights(casts, weights)
    together = [
        (cast.of(weight).rows.clone(), cast.of(weight).columns.clone())
        for cast, weight in zip(casts, weights, strict=True)
    ]
    for cast, weight, made in zip(casts, weights, together, strict=True):
        cast.refresh(weight)
        assert torch.equal(made[0].float(), cast.of(weight).rows.float())
        assert torch.equal(made[1].float(), cast.of(weight).columns.float())
        assert torch.equal(made[0].float(), made[1].float().t())


@pytest.mark.parametrize("index", range(5))
def test_every_slot_s_inverse_is_taken_by_products(index):
    table = a_table("cuda", known=448.0, **{f"x{each}": E4M3 for each in range(5)})
    slot = table.slots[f"x{index}"]
    x = torch.randn(64, 64, device="cuda").bfloat16()
    cast, _ = fp8_cast(x, slot, backend="triton")
    found = fp8_product(cast.rows, cast.rows, cast.inverse, slot.inverse, torch.bfloat16)
    assert relative_error(found, x.double() @ x.double().t()) < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits_for_the_device(backend):
    table, states, parameters = a_layer(backend)
    x = torch.randn(512, 256, device="cuda").bfloat16().requires_grad_()
    fp8_mlp(x, *parameters, "erf", states).sum().backward()  # what is made once, constants among it, may wait
    table.advance()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            fp8_mlp(x, *parameters, "erf", states).sum().backward()
            table.advance()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_step_is_the_step(backend):
    table, states, parameters = a_layer(backend)
    x = torch.randn(512, 256, device="cuda").bfloat16().requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fp8_mlp(x, *parameters, "erf", states).sum().backward()
            table.advance()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fp8_mlp(x, *parameters, "erf", states)
        (gradient,) = torch.autograd.grad(out.sum(), [x])
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    again = fp8_mlp(x, *parameters, "erf", states)
    (expected,) = torch.autograd.grad(again.sum(), [x])
    assert torch.equal(out, again)
    assert torch.equal(gradient, expected)
    assert table.slots["up.input"].amax.item() == x.abs().max().float().item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_goes_on_with_other_weights_and_scales(backend):
    table, states, parameters = a_layer(backend)
    weights = parameters[::2]
    x = torch.randn(512, 256, device="cuda").bfloat16().requires_grad_()

    def step_has_ended() -> None:
        table.advance()
        for state, weight in zip(states, weights, strict=True):
            state.weight.refresh(weight)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            fp8_mlp(x, *parameters, "erf", states).sum().backward()
            step_has_ended()
    torch.cuda.current_stream().wait_stream(stream)
    assert table.capturable
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fp8_mlp(x, *parameters, "erf", states)
        (gradient,) = torch.autograd.grad(out.sum(), [x])
    for factor in (3.0, 0.1):
        with torch.no_grad():
            x.copy_(factor * torch.randn_like(x))
            for weight in weights:
                weight.mul_(factor)
        step_has_ended()
        graph.replay()
        again = fp8_mlp(x, *parameters, "erf", states)
        (expected,) = torch.autograd.grad(again.sum(), [x])
        assert torch.equal(out, again)
        assert torch.equal(gradient, expected)
