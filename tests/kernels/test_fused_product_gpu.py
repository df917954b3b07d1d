"""Products and their ends by quack, on a GPU that it is installed on, against fp64; without it nothing is fused."""

import json

import pytest
import torch
from torch.nn import functional as F

from neox_hf.kernels import fused_product
from neox_hf.kernels.fused_product import TILES, FusedChoices, FusedProduct, fused_choices_on
from neox_hf.kernels.gelu_product import BACKWARD, FORWARD, gelu_product, gelu_product_backward
from neox_hf.kernels.product_choice import choices_on
from neox_hf.kernels.residual_product import RESIDUAL, residual_product
from tests.kernels.elementwise_cases import written_out_gelu

pytestmark = pytest.mark.gpu

SHAPES = [(4096, 1024, 4096), (4100, 1032, 4104)]
"""Tokens, hidden and inner size: whole tiles, and none whole."""

HAS_QUACK = fused_product.quack_version() in fused_product.CHECKED_QUACK


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEOX_HF_CACHE", str(tmp_path))
    for choices in (choices_on, fused_choices_on):
        choices.cache_clear()
    yield
    for choices in (choices_on, fused_choices_on):
        choices.cache_clear()


def with_tiles(*products):
    """Apart, and by every tile of theirs where quack is."""
    tiles = {tile: None for product in products for tile in product.tiles} if HAS_QUACK else ()
    return pytest.mark.parametrize("tile", [None, *tiles])


@pytest.fixture
def used(tile, monkeypatch):
    """The products that were computed by `tile`."""
    used = []

    def find(self, key, apart, fused):
        if tile is None:
            return None
        used.append(key[0])
        return TILES[tile]

    monkeypatch.setattr(FusedChoices, "find", find)
    return used


def values(*shape, dtype, scale=1.0):
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def error(found, exact):
    return (torch.linalg.vector_norm(found.double() - exact) / torch.linalg.vector_norm(exact)).item()


def no_further(found, theirs, exact):
    for ours, torch_s, truth in zip(found, theirs, exact, strict=True):
        assert ours.shape == truth.shape
        assert error(ours, truth) <= 1.05 * error(torch_s, truth) + 1e-6


CASES = [(SHAPES[0], "erf", torch.bfloat16), (SHAPES[1], "tanh", torch.bfloat16), (SHAPES[1], "erf", torch.float16)]


@with_tiles(FORWARD["erf"])
@pytest.mark.parametrize(("shape", "form", "dtype"), CASES)
def test_gelu_behind_a_product(shape, form, dtype, tile, used):
    tokens, hidden, inner = shape
    x, weight, bias = (
        values(tokens, hidden, dtype=dtype),
        values(inner, hidden, dtype=dtype, scale=hidden**-0.5),
        values(inner, dtype=dtype),
    )
    z, y = gelu_product(x.view(2, -1, hidden), weight, bias, form, "auto")
    exact = x.double() @ weight.double().t()
    product = F.linear(x, weight)
    no_further([z.flatten(0, 1)], [product], [exact])
    theirs = written_out_gelu(F.linear(x, weight, bias), None, form)
    no_further([y.flatten(0, 1)], [theirs], [written_out_gelu(exact, bias.double(), form)])
    assert used == ([] if tile is None else [FORWARD[form]])


@with_tiles(BACKWARD["erf", True])
@pytest.mark.parametrize(("shape", "form", "dtype"), CASES)
@pytest.mark.parametrize("again", [False, True])
def test_gelu_backward_behind_a_product(shape, form, dtype, again, tile, used):
    tokens, hidden, inner = shape
    dout, z = values(tokens, hidden, dtype=dtype), values(tokens, inner, dtype=dtype)
    weight, bias = values(hidden, inner, dtype=dtype, scale=hidden**-0.5), values(inner, dtype=dtype)
    dz, dbias, y = gelu_product_backward(dout, weight, z, bias, form, torch.float32, again, "auto")

    def by_autograd(dtype):
        leaves = [each.to(dtype).requires_grad_() for each in (z, bias)]
        value = written_out_gelu(*leaves, form)
        gradients = torch.autograd.grad(value, leaves, (dout.to(dtype) @ weight.to(dtype)))
        return [*gradients, *([value.detach()] if again else [])]

    no_further([dz, dbias, *([y] if again else [])], by_autograd(dtype), by_autograd(torch.float64))
    assert used == ([] if tile is None else [BACKWARD[form, again]])


@with_tiles(RESIDUAL)
@pytest.mark.parametrize(("shape", "dtype"), [(SHAPES[0], torch.bfloat16), (SHAPES[1], torch.float16)])
def test_the_sum_behind_a_product(shape, dtype, tile, used):
    tokens, hidden, inner = shape
    y, weight = values(tokens, inner, dtype=dtype), values(hidden, inner, dtype=dtype, scale=inner**-0.5)
    stream, branch = (values(tokens, hidden, dtype=dtype) for _ in range(2))
    biases = [values(hidden, dtype=dtype) for _ in range(2)]
    out = residual_product(y, weight, stream, branch, *biases, "auto")
    exact = y.double() @ weight.double().t() + sum(each.double() for each in (stream, branch, *biases))
    theirs = F.linear(y, weight, biases[0]) + (branch + biases[1]) + stream
    no_further([out], [theirs], [exact])
    assert used == ([] if tile is None else [RESIDUAL])


def test_the_quicker_way_is_found_and_remembered(tmp_path):
    x, weight, bias = (
        values(*shape, dtype=torch.bfloat16, scale=0.1) for shape in ((8192, 2048), (8192, 2048), (8192,))
    )
    first = gelu_product(x, weight, bias, "erf", "auto")
    files = list((tmp_path / "fused_products").glob("*.json"))
    assert len(files) == HAS_QUACK
    if HAS_QUACK:
        ((kind, found),) = json.loads(files[0].read_text())["products"].items()
        assert kind == "product, gelu erf bfloat16 8192x2048x8192"
        assert found["algorithm"] in (None, *FORWARD["erf"].tiles)
        assert 0 < found["ms"] <= found["plain_ms"]
    again = gelu_product(x, weight, bias, "erf", "auto")
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


@with_tiles(FusedProduct("", FORWARD["erf"].tiles[:1]))
def test_a_graph_holds_what_was_chosen_before(tile, used):
    x, weight, bias = (
        values(*shape, dtype=torch.bfloat16, scale=0.1) for shape in ((4096, 1024), (4096, 1024), (4096,))
    )
    wanted = [each.clone() for each in gelu_product(x, weight, bias, "erf", "auto")]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = gelu_product(x, weight, bias, "erf", "auto")
    for each in found:
        each.zero_()
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert len(used) == (0 if tile is None else 2)
