"""The norms' compiled kernels, at the sizes of real models."""

import pytest
import torch

from neox_hf.kernels import add_dual_layer_norm, dual_layer_norm, residual_dual_layer_norm
from neox_hf.kernels.row_norm_ops import row_norm_backward, row_norm_forward
from tests.kernels.norm_cases import DTYPES, EPS, NAMES, check, inputs_of

pytestmark = pytest.mark.gpu

SHAPES = [(2, 2048, 2048), (1025, 768), (3, 171, 2560), (77, 1001), (5, 64), (1, 4096), (515, 4096)]
"""Whole tiles; several rows a tile, one too many; padded rows; no vectors; small; one row; the widest with sums."""

WIDE = [(300, 6144), (130, 8192), (67, 16384), (9, 20480)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_norm(name, shape, dtype):
    check(name, inputs_of(name, shape, dtype, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", WIDE)
@pytest.mark.parametrize(
    "name", ["layer_norm", "residual_dual_layer_norm", "add_dual_layer_norm", "rms_norm", "scale_norm"]
)
def test_wide_rows(name, shape, dtype):
    check(name, inputs_of(name, shape, dtype, device="cuda"))


@pytest.mark.parametrize(("dtype", "weight_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("shape", [(515, 2048), (77, 1001), (33, 6144)])
def test_weights_of_another_dtype(shape, dtype, weight_dtype):
    name = "residual_dual_layer_norm"
    check(name, inputs_of(name, shape, getattr(torch, dtype), weight_dtype=getattr(torch, weight_dtype), device="cuda"))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("branches", [1, 2])
def test_one_branch_or_two(branches, biased):
    name = "add_dual_layer_norm"
    check(name, inputs_of(name, (515, 2048), torch.bfloat16, device="cuda", biased=biased, branches=branches))


@pytest.mark.parametrize("measured", [1, 500, 2048])
def test_partial_rms_norm(measured):
    check("rms_norm", inputs_of("rms_norm", (515, 2048), torch.bfloat16, device="cuda"), measured=measured)


def test_rows_apart():
    x, *affine = inputs_of("layer_norm", (515, 4096), torch.bfloat16, device="cuda")
    for strided in (x[:, ::2], x[:, 7:2055], x[::2, :2048]):
        check("layer_norm", [strided, *(a[:2048] for a in affine)])


def test_runs_agree_to_the_bit():
    inputs = [x.requires_grad_() for x in inputs_of("dual_layer_norm", (4099, 2048), torch.bfloat16, device="cuda")]

    def gradients():
        y1, y2 = dual_layer_norm(*inputs, EPS)
        return torch.autograd.grad((y1 * y2).sum(), inputs)

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_backward_can_write_the_norms_again():
    x, *affines = inputs_of("dual_layer_norm", (515, 2048), torch.bfloat16, device="cuda")
    settings = EPS, "layer", 2048
    written = row_norm_forward(x, None, None, *affines, *settings)
    _, y1, y2, _ = row_norm_backward(x, x, x, x, *affines, *settings, True, torch.bfloat16, True)
    assert all(torch.equal(a, b) for a, b in zip((y1, y2), written, strict=True))


def test_a_cuda_graph_holds_forward_and_backward():
    inputs = [x.requires_grad_() for x in inputs_of("add_dual_layer_norm", (64, 2048), torch.bfloat16, device="cuda")]

    def step():
        total, y1, y2 = add_dual_layer_norm(*inputs, EPS)
        return torch.autograd.grad((total, y1, y2), inputs, (total, y1, y2))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_inductor_sees_one_graph():
    inputs = inputs_of("residual_dual_layer_norm", (64, 2048), torch.bfloat16, device="cuda")
    norm = torch.compile(lambda *given: residual_dual_layer_norm(*given, EPS), fullgraph=True)
    plain = residual_dual_layer_norm(*inputs, EPS)
    assert all(torch.equal(a, b) for a, b in zip(norm(*inputs), plain, strict=True))
