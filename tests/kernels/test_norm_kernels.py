"""The Triton norms, run by Triton's interpreter."""

import pytest
import torch

from neox_hf import kernels
from neox_hf.kernels import (
    add_layer_norm,
    layer_norm,
    residual_dual_layer_norm,
    residual_layer_norm,
    rms_norm,
    row_norm_launches,
    scale_norm,
)
from neox_hf.kernels.gradient_dtype import gradient_dtype
from neox_hf.kernels.row_norm_launches import BACKWARD, FORWARD, BackwardPlan, Tile
from neox_hf.kernels.row_norm_ops import row_norm_backward, row_norm_forward
from tests.kernels.norm_cases import EPS, NAMES, check, inputs_of, run

SHAPE = (3, 3, 600)
"""Nine rows are five tiles of two, the last with a row too many: more tiles than programs."""


@pytest.mark.parametrize("name", NAMES)
def test_every_norm(name):
    check(name, inputs_of(name, SHAPE, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["layer_norm", "add_dual_layer_norm", "rms_norm", "scale_norm"])
def test_half_precision(name, dtype):
    check(name, inputs_of(name, (4, 520), dtype))


def test_a_sum_is_rounded_once():
    inputs = inputs_of("add_layer_norm", (4, 520), torch.float16)
    exact = sum(x.double() for x in inputs[:3])
    ours, torchs = (add_layer_norm(*inputs, EPS, backend=backend)[0] for backend in ("triton", "torch"))
    assert torch.equal(ours, exact.to(torch.float16))
    assert (ours - exact).norm() < 0.9 * (torchs - exact).norm()


@pytest.mark.parametrize(("dtype", "weight_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_weights_of_another_dtype(dtype, weight_dtype):
    inputs = inputs_of("dual_layer_norm", (5, 40), getattr(torch, dtype), weight_dtype=getattr(torch, weight_dtype))
    check("dual_layer_norm", inputs)


@pytest.mark.parametrize("name", ["layer_norm", "residual_dual_layer_norm"])
def test_without_biases(name):
    check(name, inputs_of(name, (5, 40), torch.float32, biased=False))


def test_one_branch():
    check("add_layer_norm", inputs_of("add_layer_norm", (5, 40), torch.float32, branches=1))


def test_partial_rms_norm():
    check("rms_norm", inputs_of("rms_norm", (5, 40), torch.float32), measured=13)


@pytest.mark.parametrize("name", ["layer_norm", "residual_dual_layer_norm", "rms_norm"])
def test_rows_too_wide_to_keep_sums_beside_them(name, monkeypatch):
    monkeypatch.setattr(row_norm_launches, "WIDEST_WITH_SUMS", 0)
    check(name, inputs_of(name, (19, 140), torch.float32, biased=name != "residual_dual_layer_norm"))


def test_rows_apart():
    x, *affine = inputs_of("layer_norm", (5, 80), torch.float32)
    for strided in (x[:, ::2], x[:, 7:47], torch.randn(40, 5).t()):
        check("layer_norm", [strided, *(a[:40] for a in affine)])


@pytest.mark.parametrize("shape", [(0, 16), (3, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_norm(name, shape):
    inputs = inputs_of(name, shape, torch.float32)
    results = run(lambda *given: getattr(kernels, name)(*given, EPS, backend="triton"), inputs)
    assert all(not result.any() for result in results)
    assert [x.shape for x in results[-1:]] == [inputs[-1].shape]


def test_rows_of_zeros_have_no_nan():
    x = torch.zeros(2, 16)
    for value, gradient, *_ in (
        run(lambda x, w: rms_norm(x, w, EPS, backend="triton"), [x, torch.ones(16)]),
        run(lambda x, g: scale_norm(x, g, EPS, backend="triton"), [x, torch.ones(())]),
    ):
        assert not value.any()
        assert gradient.isfinite().all()


def test_an_eps_of_zero_reaches_no_row_that_is_not_there():
    results = run(
        lambda *given: layer_norm(*given, 0.0, backend="triton"), inputs_of("layer_norm", (1, 600), torch.float32)
    )
    assert all(result.isfinite().all() for result in results)


def test_the_residual_is_x_itself():
    x, *affine = inputs_of("residual_layer_norm", (2, 16), torch.float32)
    residual, _ = residual_layer_norm(x.requires_grad_(), *affine, EPS, backend="triton")
    assert residual.data_ptr() == x.data_ptr()
    residual.sum().backward()  # the norm goes unused
    assert torch.equal(x.grad, torch.ones_like(x))


def test_the_sum_is_rounded_once_and_its_gradient_is_shared():
    x, branch = torch.tensor([[256.0, 1.0]]).to(torch.bfloat16), torch.tensor([[1.0, 1.0]]).to(torch.bfloat16)
    one = torch.ones(2, dtype=torch.bfloat16)
    leaves = [each.clone().requires_grad_() for each in (x, branch, branch)]
    total, y = add_layer_norm(*leaves, one, None, EPS, backend="triton")
    assert total.tolist() == [[258.0, 3.0]]
    (total + y).sum().backward()
    assert all(torch.equal(leaf.grad, leaves[0].grad) for leaf in leaves)


def test_an_unused_norm_of_two():
    inputs = inputs_of("residual_dual_layer_norm", (3, 24), torch.float32)
    x, *affines = (each.requires_grad_() for each in inputs)
    residual, first, _ = residual_dual_layer_norm(x, *affines, EPS, backend="triton")
    (residual * first).sum().backward()
    again = x.detach().clone().requires_grad_()
    (again * layer_norm(again, *affines[:2], EPS)).sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    assert not affines[2].grad.any()


@pytest.mark.parametrize("wanted", [[0], [1], [2], [1, 2], []])
def test_frozen_inputs(wanted):
    inputs = inputs_of("layer_norm", (3, 24), torch.float32)
    expected = run(lambda *given: layer_norm(*given, EPS), inputs)[1:]
    for place in wanted:
        inputs[place].requires_grad_()
    y = layer_norm(*inputs, EPS, backend="triton")
    assert y.requires_grad == bool(wanted)
    if wanted:
        weighing = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(y)
        y.backward(weighing)
    for place, each in enumerate(inputs):
        assert (each.grad is not None) == (place in wanted)
        if place in wanted:
            torch.testing.assert_close(each.grad, expected[place])


def test_gradients_in_the_dtype_that_autograd_keeps():
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    assert gradient_dtype(weight) == torch.bfloat16
    weight.grad_dtype = torch.float32
    assert gradient_dtype(weight) == torch.float32
    assert gradient_dtype(weight.view_as(weight)) == torch.bfloat16
    weight.grad_dtype = None
    assert gradient_dtype(weight) == torch.float32


def test_a_wide_gradient_is_not_rounded():
    x, weight, bias = inputs_of("layer_norm", (7, 24), torch.bfloat16)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    weight.grad_dtype = torch.float32
    layer_norm(x, weight, bias, EPS, backend="triton").sum().backward()
    wide = weight.detach().float().requires_grad_()
    layer_norm(x.float(), wide, None, EPS).sum().backward()
    assert weight.grad.dtype == torch.float32
    assert bias.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad, wide.grad, rtol=1e-5, atol=1e-5)


SETTINGS = (EPS, "layer", 24)


def test_backward_can_write_the_norms_again():
    x, *affines = inputs_of("dual_layer_norm", (3, 24), torch.bfloat16)
    written = row_norm_forward(x, None, None, *affines, *SETTINGS)
    dy = torch.randn_like(x)
    plain = row_norm_backward(x, None, dy, dy, *affines, *SETTINGS, True, torch.float32, False)
    dx, y1, y2, parameters = row_norm_backward(x, None, dy, dy, *affines, *SETTINGS, True, torch.float32, True)
    assert all(torch.equal(a, b) for a, b in zip([dx, parameters], plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip([y1, y2], written, strict=True))


def test_registration():
    x, first, second, *affines = inputs_of("add_dual_layer_norm", (3, 24), torch.float32)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(row_norm_forward, (x, first, second, *affines, *SETTINGS), test_utils=checks)
    torch.library.opcheck(row_norm_forward, (x, None, None, *affines[:2], None, None, *SETTINGS), test_utils=checks)
    for options in ((True, torch.float32, True), (False, torch.bfloat16, False), (True, None, False)):
        arguments = (x, first, second, x, *affines, *SETTINGS, *options)
        torch.library.opcheck(row_norm_backward, arguments, test_utils=checks)


@pytest.mark.parametrize("name", ["residual_dual_layer_norm", "add_layer_norm", "scale_norm"])
def test_a_compiler_sees_one_graph(name):
    inputs = inputs_of(name, (3, 24), torch.float32)

    def norm(*given):
        return getattr(kernels, name)(*given, EPS, backend="triton")

    compiled = run(torch.compile(norm, fullgraph=True, backend="aot_eager"), inputs)
    assert all(torch.equal(a, b) for a, b in zip(compiled, run(norm, inputs), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_meta(name):
    inputs = [x if x is None else x.to("meta") for x in inputs_of(name, (3, 24), torch.bfloat16)]
    x = inputs[0].requires_grad_()
    values = getattr(kernels, name)(*inputs, EPS, backend="triton")
    values = values if isinstance(values, tuple) else (values,)
    assert {(y.shape, y.dtype, y.device.type) for y in values} == {(x.shape, x.dtype, "meta")}
    sum(y.sum() for y in values).backward()
    assert (x.grad.shape, x.grad.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize(
    ("width", "tile"),
    [
        (64, Tile(32, 64, warps=4)),
        (768, Tile(2, 1024, warps=4)),
        (2048, Tile(1, 2048, warps=4)),
        (4096, Tile(1, 4096, warps=8)),
        (6144, Tile(1, 8192, warps=16)),
        (16384, Tile(1, 16384, warps=16)),
        (20480, Tile(1, 32768, warps=32)),
    ],
)
def test_tiles(width, tile):
    assert Tile.of(width) == FORWARD.default(width, 2) == tile


@pytest.mark.parametrize(
    ("width", "parameters", "bytes_read", "expected"),
    [
        (2048, 2, 4, BackwardPlan(528, 3, True)),
        (2048, 4, 8, BackwardPlan(396, 3, True)),
        (4096, 4, 8, BackwardPlan(132, 3, True)),
        (8192, 2, 4, BackwardPlan(132, 3, True)),
        (8192, 4, 8, BackwardPlan(132, 3, False)),
        (16384, 4, 16, BackwardPlan(132, 1, False)),
    ],
)
def test_backward_plans_of_an_h200(width, parameters, bytes_read, expected):
    launch = BACKWARD.default(width, parameters, bytes_read)
    assert launch.warps == Tile.of(width).warps
    plan = BackwardPlan.of(width, 16384, parameters, "layer", bytes_read, 132, launch.resident)
    assert plan == expected


def test_few_rows_take_few_programs():
    assert BackwardPlan.of(768, 5, 2, "layer", 4, 132, 4).programs == 3


def test_shapes_that_do_not_fit_are_refused():
    x, weight = torch.randn(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"cannot add \[8\] to x \[2, 8\]; both must be of one shape"):
        add_layer_norm(x, weight, None, weight, None, EPS, backend="triton")
    with pytest.raises(ValueError, match=r"x \[2, 8\] was given a weight or bias \[2, 8\]; \[8\] is wanted"):
        layer_norm(x, weight, x, EPS, backend="triton")
    with pytest.raises(ValueError, match=r"x \[2, 8\] was given a weight or bias \[8\]; one number is wanted"):
        scale_norm(x, weight, EPS, backend="triton")


def test_the_one_weight_of_a_scale_norm_has_its_whole_sum():
    """Terms of either sign, a row's as large as 1; each row's is rounded a few times, their sum is not."""
    torch.manual_seed(0)
    x, dy = torch.randn(700, 64), torch.randn(700, 64)
    g = torch.ones(1, requires_grad=True)
    scale_norm(x, g, EPS, backend="triton").backward(dy)
    terms = (dy.double() * x.double() / x.double().norm(dim=1, keepdim=True)).sum(1)
    assert abs(g.grad.item() - terms.sum().item()) <= 2**-24 * terms.norm().item() + 2**-24 * abs(terms.sum().item())
