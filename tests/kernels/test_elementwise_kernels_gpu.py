"""Bias and GELU, bias, dropout and residual, causal softmax: the compiled kernels at sizes of real models."""

import pytest
import torch

from neox_hf.kernels import bias_dropout_residual, bias_gelu, causal_softmax, column_sums, draw_dropout_seed
from tests.kernels.elementwise_cases import (
    DTYPES,
    branches,
    check_bias_gelu,
    check_bias_residual,
    check_causal_softmax,
    check_column_sums,
    check_dropout,
    run,
)

pytestmark = pytest.mark.gpu
SHAPES = [(2, 512, 8192), (3, 171, 3072), (1025, 2048), (77, 1001), (5, 64)]
"""Whole tiles; blocks of another width; a row and a column too many; one small."""


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("form", ["erf", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bias_gelu(shape, dtype, form, with_bias):
    check_bias_gelu("cuda", shape, dtype, form, with_bias)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bias_residual(shape, dtype, with_bias, count):
    check_bias_residual("cuda", shape, dtype, count, with_bias)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dropout(shape, dtype, count):
    check_dropout("cuda", shape, dtype, count, 0.1, torch.tensor([2**50 + 7], device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16384, 2048), *SHAPES])
def test_column_sums(shape, dtype):
    check_column_sums("cuda", shape, dtype)


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "mask_shape"),
    [
        ((2, 4, 512, 512), None),
        ((2, 3, 333, 333), (2, 1, 333, 333)),
        ((1, 2, 64, 2048), (1, 2, 64, 2048)),
        ((1, 1, 9, 9001), None),
    ],
)
def test_causal_softmax(shape, mask_shape, dtype, overwrite):
    check_causal_softmax("cuda", shape, dtype, mask_shape, overwrite)


def test_more_elements_than_32_bits_count():
    x = torch.zeros(2**18 + 1, 8192, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(8192, device="cuda")
    last = x[-1].clone()
    assert torch.equal(bias_gelu(x, None, "erf", backend="triton")[-1], bias_gelu(last, None, "erf", backend="triton"))
    torch.testing.assert_close(column_sums(x, torch.float32), last.float())


def test_a_graph_draws_anew_in_each_replay():
    inputs = branches("cuda", (64, 512), torch.bfloat16, 2, with_bias=True)

    def step():
        seed = draw_dropout_seed(torch.device("cuda"))
        return run(lambda *a: bias_dropout_residual(*a, 0.5, seed, backend="triton"), inputs, inputs[0])

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, *gradients = step()
    drawn = []
    for _ in range(2):
        graph.replay()
        drawn.append((y.clone(), gradients[1] == 0))
    assert not torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][0], drawn[1][0])


@pytest.mark.parametrize("name", ["gelu", "dropout", "softmax"])
def test_no_wait_for_the_device(name):
    x, bias = torch.randn(64, 512, device="cuda"), torch.randn(512, device="cuda")
    seed = draw_dropout_seed(torch.device("cuda"))
    functions = {
        "gelu": lambda x, b: bias_gelu(x, b, "erf", backend="triton"),
        "dropout": lambda x, b: bias_dropout_residual(x, 2 * x, b, probability=0.1, seed=seed, backend="triton"),
        "softmax": lambda x, b: causal_softmax((x + b).view(1, 1, 64, 512), 0.1, backend="triton").view(64, 512),
    }
    run(functions[name], [x, bias], x)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(functions[name], [x, bias], x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
