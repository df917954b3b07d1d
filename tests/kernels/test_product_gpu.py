"""Products by cuBLASLt on a GPU: all its algorithms are right, and one that was chosen stays chosen."""

import json

import pytest
import torch
from torch.nn import functional as F

from neox_hf.kernels import product_choice
from neox_hf.kernels.cublaslt import Product, cublaslt
from neox_hf.kernels.linear import linear
from neox_hf.kernels.product import linear_product, problem_of, product_, torch_product_
from neox_hf.kernels.product_choice import choices_on
from neox_hf.kernels.weight_gradient import SumInGrad, sum_in

pytestmark = pytest.mark.gpu

ROWS, INNER, COLUMNS = 4096, 1024, 1536


def operand(rows, columns, transposed, dtype=torch.bfloat16):
    shape = (columns, rows) if transposed else (rows, columns)
    x = torch.randn(*shape, device="cuda", dtype=dtype)
    return x.t() if transposed else x


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("NEOX_HF_CACHE", str(tmp_path))
    choices_on.cache_clear()
    torch.manual_seed(0)
    torch.mm(
        torch.ones(8, 8, device="cuda"), torch.ones(8, 8, device="cuda")
    )  # torch's handle: none is made in a graph
    yield
    choices_on.cache_clear()


def remembered(tmp_path):
    (path,) = (tmp_path / "products").glob("*.json")
    return json.loads(path.read_text())["products"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True], ids=["same dtype", "fp32"])
@pytest.mark.parametrize(
    "orders", [(False, False), (False, True), (True, False)], ids=["row row", "row column", "column row"]
)
@pytest.mark.parametrize("keep", [False, True], ids=["write", "add"])
def test_every_algorithm_is_no_further_from_the_truth_than_torch(dtype, wide, orders, keep):
    a, b = operand(ROWS, INNER, orders[0], dtype), operand(INNER, COLUMNS, orders[1], dtype)
    before = torch.randn(ROWS, COLUMNS, device="cuda", dtype=torch.float32 if wide else dtype)
    exact = a.double() @ b.double() + (before.double() if keep else 0)
    allowed = error(torch_product_(before.clone(), a, b, keep=keep), exact)
    product = Product(cublaslt(), problem_of(before, a, b, None))
    proposals = product.proposals()
    assert len(proposals) > 1
    for algorithm in proposals:
        out = before.clone() if keep else torch.full_like(before, torch.nan)
        product.run(algorithm, out, a, b, keep=keep)
        assert error(out, exact) <= 1.05 * allowed + 1e-6, algorithm.text
        assert product.restored(algorithm.text).workspace == algorithm.workspace


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_algorithm_adds_the_bias(dtype):
    a, b = operand(ROWS, INNER, False, dtype), operand(INNER, COLUMNS, True, dtype)
    bias = torch.randn(COLUMNS, device="cuda", dtype=dtype)
    exact = a.double() @ b.double() + bias.double()
    allowed = error(F.linear(a, b.t(), bias), exact)
    product = Product(cublaslt(), problem_of(a.new_empty(ROWS, COLUMNS), a, b, bias))
    for algorithm in product.proposals():
        out = a.new_full((ROWS, COLUMNS), torch.nan)
        product.run(algorithm, out, a, b, bias)
        assert error(out, exact) <= 1.05 * allowed + 1e-6, algorithm.text


@pytest.mark.parametrize("biased", [False, True])
def test_parts_of_larger_matrices(biased):
    a = torch.randn(ROWS, 2 * INNER, device="cuda", dtype=torch.bfloat16)[:, :INNER]
    weight = torch.randn(COLUMNS + 8, INNER, device="cuda", dtype=torch.bfloat16)[8:]
    bias = torch.randn(COLUMNS, device="cuda", dtype=torch.bfloat16) if biased else None
    whole = torch.full((ROWS, COLUMNS + 64), 7.0, device="cuda", dtype=torch.bfloat16)
    out = product_(whole[:, :COLUMNS], a, weight.t(), bias)
    exact = a.double() @ weight.double().t() + (bias.double() if biased else 0)
    assert error(out, exact) <= 1.05 * error(F.linear(a, weight, bias), exact) + 1e-6
    assert (whole[:, COLUMNS:] == 7).all()


def test_what_was_measured_is_remembered(tmp_path, monkeypatch):
    a, b = operand(ROWS, INNER, False), operand(INNER, COLUMNS, True)
    out = torch.empty(ROWS, COLUMNS, device="cuda", dtype=torch.bfloat16)
    first = product_(out, a, b).clone()
    ((kind, found),) = remembered(tmp_path).items()
    assert kind == "bfloat16 4096x1024x1536 row column -> bfloat16"
    assert 0 < found["ms"] <= found["plain_ms"]
    choices_on.cache_clear()
    monkeypatch.setattr(product_choice, "measure", None)
    assert torch.equal(product_(out.zero_(), a, b), first)
    assert torch.equal(linear_product(a, b.t()), first)


def test_a_sum_is_measured_beside_it(tmp_path):
    a, b = operand(COLUMNS, ROWS, True), operand(ROWS, INNER, False)
    total = torch.ones(COLUMNS, INNER, device="cuda")
    product_(total, a, b, keep=True)
    assert error(total, 1 + a.double() @ b.double()) < 1e-5
    assert len(remembered(tmp_path)) == 1


def test_a_graph_holds_what_was_chosen_before(tmp_path):
    a, b = operand(ROWS, INNER, False), operand(INNER, COLUMNS, True)
    out = torch.empty(ROWS, COLUMNS, device="cuda", dtype=torch.bfloat16)

    def captured():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            product_(out, a, b)
        out.zero_()
        graph.replay()
        return out.clone()

    unmeasured = captured()
    assert not (tmp_path / "products").exists()
    wanted = product_(out, a, b).clone()
    assert len(remembered(tmp_path)) == 1
    assert torch.equal(captured(), wanted)
    torch.testing.assert_close(unmeasured, wanted)


def test_a_linear_and_its_gradients(tmp_path):
    torch.manual_seed(1)
    layer = torch.nn.Linear(INNER, COLUMNS, device="cuda", dtype=torch.bfloat16)
    layer.weight.grad_dtype = torch.float32
    sum_in(layer.weight, SumInGrad())
    x = torch.randn(4, ROWS // 4, INNER, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(4, ROWS // 4, COLUMNS, device="cuda", dtype=torch.bfloat16)
    y = linear(x, layer.weight, layer.bias)
    y.backward(dy)
    assert len(remembered(tmp_path)) == 3
    truth = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    exact = F.linear(*truth)
    exact.backward(dy.double())
    assert error(y, exact.detach()) < 3e-3
    assert error(x.grad, truth[0].grad) < 3e-3
    assert error(layer.weight.grad, truth[1].grad) < 1e-5
    assert error(layer.bias.grad, truth[2].grad) < 3e-3


def test_torch_is_left_alone_where_it_was_asked_for(tmp_path):
    a, b = operand(ROWS, INNER, False), operand(INNER, COLUMNS, True)
    out = torch.empty(ROWS, COLUMNS, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(product_(out, a, b, backend="torch"), a @ b)
    torch.use_deterministic_algorithms(True)
    try:
        product_(out, a, b)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not (tmp_path / "products").exists()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_linear_whose_gradients_autograd_sums(frozen, tmp_path):
    layer = torch.nn.Linear(INNER, COLUMNS, device="cuda", dtype=torch.bfloat16).requires_grad_(not frozen)
    x = torch.randn(4, ROWS // 4, INNER, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(4, ROWS // 4, COLUMNS, device="cuda", dtype=torch.bfloat16)
    linear(x, layer.weight, layer.bias).backward(dy)
    assert len(remembered(tmp_path)) == (2 if frozen else 3)
    truth = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    F.linear(*truth).backward(dy.double())
    for found, exact in zip((x, layer.weight, layer.bias)[: 1 if frozen else 3], truth, strict=False):
        assert error(found.grad, exact.grad) < 3e-3
