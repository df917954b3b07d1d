"""Products: what cuBLASLt is told computes them, who computes which, and what is remembered of it."""

import gc
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from neox_hf.kernels import cublaslt as cublaslt_module
from neox_hf.kernels import linear as linear_module
from neox_hf.kernels import measured_choice, product_choice
from neox_hf.kernels import product as product_module
from neox_hf.kernels.choice_file import ChoiceFile, Measured
from neox_hf.kernels.cublaslt import CublasLtError, Product, cublaslt, is_encoding
from neox_hf.kernels.linear import linear
from neox_hf.kernels.measured_choice import coarse
from neox_hf.kernels.product import linear_product, problem_of, product_, torch_product_
from neox_hf.kernels.product_choice import ProductChoices, choices_on, kind_of
from neox_hf.kernels.weight_gradient import SumInGrad, sum_in
from neox_hf.modeling.recompute import selective_contexts
from tests.kernels.cublaslt_stand_in import CublasLt

DEVICE = "NVIDIA H200"
KIND = "bfloat16 64x32x48 row column -> bfloat16, aligned to 16"


def operand(rows, columns, transposed=False, dtype=torch.bfloat16, room=0):
    """A matrix that lies by row or by column, with `room` between one and the next."""
    shape = (columns, rows + room) if transposed else (rows, columns + room)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(rows + columns)).to(dtype)
    return x[:, :rows].t() if transposed else x[:, :columns]


def exact(a, b, bias=None):
    return a.double() @ b.double() + (0 if bias is None else bias.double())


def close(found, wanted):
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-2)


@pytest.fixture
def on_the_host(monkeypatch):
    """The library's handle, and the stream, of a device that this host has not got."""
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0, synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.fixture
def library(on_the_host, monkeypatch):
    """cuBLASLt, chosen for products of any size; its second algorithm is quickest, torch's product comes next."""
    library = CublasLt()
    for module in (product_module, linear_module):
        monkeypatch.setattr(module, "is_chosen", lambda backend, a, b: backend != "torch")
    monkeypatch.setattr(product_module, "MOST_ALIGNMENT", 16)  # which all memory has
    monkeypatch.setattr(measured_choice, "medians", quickest(2))
    return library


@pytest.fixture
def choices(library, tmp_path, monkeypatch):
    choices = ProductChoices(library, file_in(tmp_path))
    monkeypatch.setattr(product_module, "choices_on", lambda device: choices)
    return choices


def quickest(number):
    """ms of everything that is timed; all of it runs once."""

    def medians(computes, rounds, calls):
        for compute in computes.values():
            compute()
        return {text: 1.0 if text is None else 0.5 if text.startswith(f"0{number}") else 2.0 for text in computes}

    return medians


def file_in(folder, version="130100"):
    return ChoiceFile(folder / "products" / "NVIDIA_H200.json", DEVICE, "cublaslt", version, is_encoding)


def said_in(file):
    return json.loads(file.path.read_text())["products"]


@pytest.mark.parametrize("orders", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("room", [0, 8])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_the_library_is_told_the_product(orders, room, out_dtype, on_the_host):
    library = CublasLt()
    a, b = operand(64, 32, orders[0], room=room), operand(32, 48, orders[1], room=room)
    whole = torch.full((64, 48 + room), 3.0, dtype=out_dtype)
    out = whole[:, :48]
    product = Product(library, problem_of(out, a, b, None))
    first, *_ = product.proposals()
    product.run(first, out, a, b)
    close(out, exact(a, b))
    product.run(first, out, a, b, keep=True)
    close(out, 2 * exact(a, b))
    assert (whole[:, 48:] == 3).all()
    del product
    gc.collect()
    assert library.objects == {}


def test_the_library_adds_the_bias(on_the_host):
    library, a, b = CublasLt(), operand(64, 32), operand(32, 48, True)
    biases = torch.randn(2, 48).bfloat16()
    out = torch.empty(64, 48, dtype=torch.bfloat16)
    product = Product(library, problem_of(out, a, b, biases[0]))
    for bias in biases:
        product.run(product.proposals()[1], out, a, b, bias)
        close(out, exact(a, b, bias))


@pytest.mark.parametrize(("biased", "numbers"), [(False, [1, 2, 3, 4, 5]), (True, [1, 2, 3, 4])])
def test_with_a_bias_all_is_proposed_that_takes_one(biased, numbers, on_the_host):
    library, a, b = CublasLt(), operand(64, 32), operand(32, 48)
    library.without_bias = 2
    out, bias = torch.empty(64, 48).bfloat16(), torch.randn(48).bfloat16() if biased else None
    product = Product(library, problem_of(out, a, b, bias))
    found = product.proposals()
    assert [each.code.data[0] for each in found] == numbers
    for each in found:
        product.run(each, out, a, b, bias)
        close(out, exact(a, b, bias))


def test_sums_that_are_split_are_added_in_fp32(on_the_host):
    library = CublasLt()
    problem = problem_of(torch.empty(64, 48).bfloat16(), operand(64, 32), operand(32, 48), None)
    Product(library, problem._replace(alignment=32)).proposals()
    assert library.preferences == {1: 64 * 2**20, 3: 2, 5: 32, 6: 32, 7: 32, 8: 32}


def test_a_refusal_is_an_error(on_the_host):
    library = CublasLt(refused=[1])
    a, b, out = operand(64, 32), operand(32, 48), torch.empty(64, 48).bfloat16()
    product = Product(library, problem_of(out, a, b, None))
    with pytest.raises(CublasLtError, match="status 15"):
        product.run(product.proposals()[0], out, a, b)
    assert product.restored("09" + 63 * "00") is None


@pytest.mark.parametrize(
    ("out", "a", "b", "bias"),
    [
        (operand(64, 48), operand(64, 32)[::2], operand(32, 48)[:, ::2], None),
        (operand(64, 48), torch.ones(1, 1).bfloat16().expand(64, 32), operand(32, 48), None),
        (operand(64, 48, True), operand(64, 32), operand(32, 48), None),
        (operand(64, 48), operand(64, 32, room=1), operand(32, 48), None),
        (operand(64, 48), operand(64, 40)[:, 1:33], operand(32, 48), None),
        (operand(64, 48), operand(64, 32), operand(32, 48), torch.zeros(48)),
        (operand(64, 48), operand(64, 32), operand(32, 48), torch.zeros(96).bfloat16()[::2]),
    ],
    ids=["columns apart", "expanded", "out by column", "row of odd bytes", "begins oddly", "wide bias", "sparse bias"],
)
def test_what_lies_badly_is_no_problem_of_the_library(out, a, b, bias):
    assert problem_of(out, a, b, bias) is None


def test_without_cuda_there_is_no_library(monkeypatch):
    for version, found in ((None, None), ("0.0", None)):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert cublaslt.__wrapped__() is found
    assert choices_on.__wrapped__(torch.device("cpu")) is None
    monkeypatch.setattr(product_choice, "cublaslt", lambda: None)
    assert choices_on.__wrapped__(torch.device("cuda", 0)) is None


def test_the_library_is_that_of_torch_s_cuda(monkeypatch):
    opened = []

    def open_(name):
        opened.append(name)
        return SimpleNamespace(cublasLtGetVersion=lambda: 130100)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cublaslt_module.ctypes, "CDLL", open_)
    cublaslt.__wrapped__()
    assert opened == ["libcublasLt.so.13"]


def test_choices_are_those_of_the_device(monkeypatch, tmp_path):
    monkeypatch.setenv("NEOX_HF_CACHE", str(tmp_path))
    monkeypatch.setattr(product_choice, "cublaslt", CublasLt)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICE)
    file_in(tmp_path).agree(KIND, Measured(None, 1.0, 1.0))
    assert choices_on.__wrapped__(torch.device("cuda", 0)).measured == {KIND: Measured(None, 1.0, 1.0)}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2]
)
def test_by_torch(keep, dtypes):
    a, b = operand(6, 4, dtype=dtypes[0]), operand(4, 5, True, dtype=dtypes[0])
    out = torch.full((6, 5), 1.0, dtype=dtypes[1])
    assert product_(out, a, b, keep=keep) is out
    close(out, exact(a, b) + keep)


def test_by_torch_with_a_bias():
    a, b, bias = operand(6, 4), operand(4, 5), torch.randn(5).bfloat16()
    close(torch_product_(torch.empty(6, 5).bfloat16(), a, b, bias), exact(a, b, bias))
    assert torch.equal(linear_product(a, b.t(), bias), F.linear(a, b.t(), bias))


def test_the_quickest_is_taken_and_remembered(choices, library, tmp_path):
    a, b, out = operand(64, 32), operand(32, 48, True), torch.empty(64, 48).bfloat16()
    close(product_(out, a, b), exact(a, b))
    assert library.launched[-1] == 2
    assert said_in(file_in(tmp_path)) == {KIND: {"algorithm": "02" + 63 * "00", "plain_ms": 1.0, "ms": 0.5}}
    library.launched.clear()
    product_(out, a, b)
    assert library.launched == [2]


def test_a_later_run_takes_it_without_measuring(choices, library, tmp_path, monkeypatch):
    a, b, out = operand(64, 32), operand(32, 48, True), torch.empty(64, 48).bfloat16()
    product_(out, a, b)
    later = ProductChoices(library, file_in(tmp_path))
    monkeypatch.setattr(product_module, "choices_on", lambda device: later)
    monkeypatch.setattr(product_choice, "measure", None)
    library.launched.clear()
    close(product_(out, a, b), exact(a, b))
    longer = operand(62, 32)  # of the same kind
    close(product_(out[:62], longer, b), exact(longer, b))
    assert library.launched == [2, 2]


def test_another_version_of_the_library_measures_again(choices, library, tmp_path):
    product_(torch.empty(64, 48).bfloat16(), operand(64, 32), operand(32, 48, True))
    assert file_in(tmp_path, version="130200").read() == {}
    assert file_in(tmp_path).read() != {}


def test_torch_is_taken_where_nothing_beats_it(choices, library, tmp_path, monkeypatch):
    monkeypatch.setattr(measured_choice, "medians", lambda computes, *_: dict.fromkeys(computes, 1.0))
    a, b, out = operand(64, 32), operand(32, 48, True), torch.empty(64, 48).bfloat16()
    product_(out, a, b)
    library.launched.clear()
    assert torch.equal(product_(out, a, b), a @ b)
    assert library.launched == []
    assert said_in(file_in(tmp_path))[KIND]["algorithm"] is None


def test_what_cannot_be_launched_is_not_timed(choices, library, tmp_path, monkeypatch):
    library.refused.add(2)
    timed = []
    monkeypatch.setattr(
        measured_choice, "medians", lambda computes, *_: timed.append(list(computes)) or dict.fromkeys(computes, 1.0)
    )
    product_(torch.empty(64, 48).bfloat16(), operand(64, 32), operand(32, 48, True))
    assert [text and text[:2] for text in timed[0]] == [None, "01", "03"]


@pytest.mark.parametrize("room", [0, 16])
def test_a_sum_is_measured_elsewhere(room, choices, library, monkeypatch):
    """In memory that lies as the sum does: with room between its rows, it needs as much."""
    measured = []
    measure = product_choice.measure
    monkeypatch.setattr(product_choice, "measure", lambda p, o: measured.append(o.out) or measure(p, o))
    a, b, whole = operand(48, 64, True), operand(64, 32), torch.ones(48, 32 + room)
    total = whole[:, :32]
    product_(total, a, b, keep=True)
    close(total, 1 + exact(a, b))
    assert (whole[:, 32:] == 1).all()
    assert library.launched[-1] == 2
    assert measured[0].stride() == total.stride()
    assert measured[0].data_ptr() != total.data_ptr()


def test_nothing_is_measured_while_a_graph_is_captured(choices, library, tmp_path, monkeypatch):
    a, b, out = operand(64, 32), operand(32, 48, True), torch.empty(64, 48).bfloat16()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    close(product_(out, a, b), exact(a, b))
    assert library.launched == []
    assert not file_in(tmp_path).path.exists()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    product_(out, a, b)
    assert library.launched[-1] == 2


def test_a_library_that_fails_leaves_it_to_torch(choices, library, monkeypatch, caplog):
    monkeypatch.setattr(library, "cublasLtMatmulAlgoGetHeuristic", lambda *_: 15)
    a, b, out = operand(64, 32), operand(32, 48, True), torch.empty(64, 48).bfloat16()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            close(product_(out, a, b), exact(a, b))
    assert caplog.text.count(f"product {KIND} is left to torch: cuBLASLt answered with status 15") == 1
    assert library.launched == []


def test_an_algorithm_that_is_none_for_a_problem_leaves_it_to_torch(choices, library, tmp_path):
    choices.measured[KIND] = Measured("09" + 63 * "00", 1.0, 0.5)
    a, b, out = operand(64, 32), operand(32, 48, True), torch.empty(64, 48).bfloat16()
    assert torch.equal(product_(out, a, b), a @ b)
    assert library.launched == []


def test_plans_do_not_pile_up(choices, library, monkeypatch):
    monkeypatch.setattr(product_choice, "MOST_PLANS", 2)
    for rows in (64, 72, 80, 88):
        product_(torch.empty(rows, 48).bfloat16(), operand(rows, 32), operand(32, 48, True))
    assert len(choices.plans) == 2


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        '{"format": 2, "cublaslt": "130100", "products": {"a": {"algorithm": "02", "plain_ms": 1, "ms": 1}}}',
        '{"format": 2, "cublaslt": "130100", "products": {"a": {"algorithm": null}}}',
    ],
)
def test_a_broken_file_is_replaced(text, tmp_path, caplog):
    file = file_in(tmp_path)
    file.path.parent.mkdir()
    file.path.write_text(text)
    assert file.read() == {}
    assert "products are measured again" in caplog.text
    assert file.agree("a", Measured(None, 1.0, 1.0)) == Measured(None, 1.0, 1.0)
    assert file.agree("b", Measured(None, 2.0, 2.0)) == Measured(None, 2.0, 2.0)
    assert set(file.read()) == {"a", "b"}


def test_the_first_rank_chooses_for_all(choices, library, tmp_path, monkeypatch):
    """Two that measure at once: the second finds another algorithm quickest, and takes the first one's."""
    other = ProductChoices(library, file_in(tmp_path))
    a, b, out = operand(64, 32), operand(32, 48, True), torch.empty(64, 48).bfloat16()
    product_(out, a, b)
    monkeypatch.setattr(product_module, "choices_on", lambda device: other)
    monkeypatch.setattr(measured_choice, "medians", quickest(3))
    product_(out, a, b)
    assert library.launched[-1] == 2
    assert other.measured == choices.measured == file_in(tmp_path).read()


def test_a_folder_that_cannot_be_written_is_no_reason_to_end(tmp_path, caplog):
    (tmp_path / "products").write_text("in the way")
    assert file_in(tmp_path).agree("a", Measured(None, 1.0, 1.0)).ms == 1.0
    assert "cannot be written (" in caplog.text
    assert "set NEOX_HF_CACHE" in caplog.text


def test_kinds():
    problem = problem_of(torch.empty(64, 48), operand(64, 32), operand(32, 48), None)
    assert kind_of(problem._replace(alignment=256)) == "bfloat16 64x32x48 row row -> float32"
    assert kind_of(problem._replace(biased=True, alignment=16)).endswith("-> float32 + bias, aligned to 16")
    assert [coarse(size) for size in (1, 15, 16, 17, 768, 2304, 4095, 50304)] == [1, 15, 16, 18, 768, 2304, 4096, 53248]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ("torch", False),
        ("device", False),
        ("small", False),
        ("fp32", False),
        ("deterministic", False),
        ("autocast", False),
        (None, True),
    ],
)
def test_what_an_algorithm_is_looked_for(change, wanted, monkeypatch):
    dtype = torch.float32 if change == "fp32" else torch.bfloat16
    device = "cpu" if change == "device" else "meta"
    a, b = torch.empty(4096, 1024, device=device, dtype=dtype), torch.empty(1024, 1024, device=device, dtype=dtype)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.device.type == "meta"))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: change == "deterministic")
    monkeypatch.setattr(product_module, "autocast_dtype", lambda _: torch.float16 if change == "autocast" else None)
    backend = "torch" if change == "torch" else "auto"
    assert product_module.is_chosen(backend, a[:4095] if change == "small" else a, b) is wanted


def test_a_linear_s_three_products(choices, library):
    layer = torch.nn.Linear(32, 48, dtype=torch.bfloat16)
    layer.weight.grad_dtype = torch.float32
    sum_in(layer.weight, SumInGrad())
    x, dy = torch.randn(2, 32, 32).bfloat16().requires_grad_(), torch.randn(2, 32, 48).bfloat16()
    truth = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    y, wanted = linear(x, layer.weight, layer.bias), F.linear(*truth)
    y.backward(dy)
    wanted.backward(dy.double())
    close(y, wanted)
    close(x.grad, truth[0].grad)
    close(layer.weight.grad, truth[1].grad)
    assert len(choices.plans) == 3

    library.launched.clear()
    linear(x, layer.weight, layer.bias, backend="torch").backward(dy)
    assert library.launched == []


@pytest.mark.parametrize("frozen", [(), ("x",), ("weight",), ("bias",), ("weight", "bias"), ("x", "weight", "bias")])
def test_a_linear_whose_gradients_autograd_sums(frozen, choices, library):
    tensors = {"x": torch.randn(2, 32, 32), "weight": torch.randn(48, 32), "bias": torch.randn(48)}
    own = {name: t.bfloat16().requires_grad_(name not in frozen) for name, t in tensors.items()}
    truth = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in own.items()}
    dy = torch.randn(2, 32, 48).bfloat16()
    y, wanted = linear(*own.values()), F.linear(*truth.values())
    close(y, wanted)
    if len(frozen) < 3:
        y.backward(dy)
        wanted.backward(dy.double())
    for name, t in own.items():
        assert (t.grad is None) is (name in frozen)
        if t.grad is not None:
            close(t.grad, truth[name].grad)
    assert len(choices.plans) == (3 - ("x" in frozen) - ("weight" in frozen) if len(frozen) < 3 else 0)


def test_selective_recomputation_keeps_the_product(choices, library):
    weight = torch.randn(48, 32).bfloat16().requires_grad_()
    x = operand(64, 32).requires_grad_()
    linear(x, weight).cos().sum().backward()  # all three have a plan now
    library.launched.clear()
    how = {"use_reentrant": False, "context_fn": selective_contexts}
    checkpoint(lambda x: linear(x.sin(), weight).cos(), x, **how).sum().backward()
    assert library.launched == [2, 2, 2]


def test_a_fake_tensor_knows_the_ops():
    a, b, out = operand(64, 32), operand(32, 48), torch.empty(64, 48).bfloat16()
    whole = (a, b.t().contiguous(), None)
    torch.library.opcheck(product_module.linear_product_op, whole, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(
        product_module.product, (out, a, b, None, False), test_utils=("test_schema", "test_faketensor")
    )


def test_turns_are_timed_behind_as_many_calls_untimed(on_the_host, monkeypatch):
    """On this host by a clock that counts calls, of which some take longer."""
    ticks = []
    monkeypatch.setattr(measured_choice, "_event", lambda: Event(sum(ticks)))
    computes = {None: lambda: ticks.append(3.0), "quick": lambda: ticks.append(1.0)}
    assert measured_choice.medians(computes, 5, {None: 2, "quick": 6}) == {None: 3.0, "quick": 1.0}
    assert (ticks.count(3.0), ticks.count(1.0)) == (5 * 2 * 2, 5 * 2 * 6)


def test_measuring_has_a_share_of_the_time(choices, library, tmp_path, monkeypatch):
    """Of a run in which every measurement takes 40 s: two at once, the next when 50 times as long has gone by."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(measured_choice, "time", SimpleNamespace(monotonic=lambda: clock.now))
    measure = product_choice.measure

    def slow(product, operands):
        clock.now += 40
        return measure(product, operands)

    monkeypatch.setattr(product_choice, "measure", slow)
    choices._begin = clock.now

    def kinds_after(columns):
        a, b = operand(64, 32), operand(32, columns, True)
        close(product_(torch.empty(64, columns).bfloat16(), a, b), exact(a, b))
        return len(said_in(file_in(tmp_path)))

    assert [kinds_after(columns) for columns in (16, 32, 48, 48)] == [1, 2, 2, 2]
    clock.now = 1000.0 + 20 * 50 - 1
    assert kinds_after(48) == 2
    clock.now += 1
    assert kinds_after(48) == 3
    library.launched.clear()
    kinds_after(48)
    assert library.launched == [2]


def test_who_is_in_front_is_timed_again_for_as_long_as_a_clock_takes_to_settle(choices, library, monkeypatch):
    """The first of all in a short time, which is not the first over a longer one."""
    library.algorithms = 6
    timed = []

    def medians(computes, rounds, calls):
        timed.append((rounds, {text and int(text[:2]): count for text, count in calls.items()}))
        ms = {None: 1.0, 6: 0.5, 1: 0.7, 4: 0.8, 5: 0.875, 2: 2.0, 3: 3.0}
        ms = ms if rounds == measured_choice.QUICK_ROUNDS else dict.fromkeys(ms, 0.9) | {None: 1.0, 5: 0.6}
        return {text: ms[text and int(text[:2])] for text in computes}

    monkeypatch.setattr(measured_choice, "medians", medians)
    product_(torch.empty(64, 48).bfloat16(), operand(64, 32), operand(32, 48, True))
    (_, quick), (rounds, steady) = timed
    assert set(quick.values()) == {measured_choice.QUICK_CALLS}
    assert (rounds, steady) == (measured_choice.STEADY_ROUNDS, {None: 35, 6: 70, 1: 50, 4: 44, 5: 40})
    assert library.launched[-1] == 5
    assert measured_choice.steady_calls(100.0) == 1


class Event:
    def __init__(self, at):
        self.at = at

    def elapsed_time(self, end):
        return end.at - self.at

    def synchronize(self):
        pass
