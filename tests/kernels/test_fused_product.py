"""Products that go on with what comes next: what quack is told computes them, and when it is asked."""

import importlib.metadata
import json
import logging
from types import SimpleNamespace

import pytest
import torch

from neox_hf.kernels import fused_product, gelu_product, measured_choice, residual_product
from neox_hf.kernels.choice_file import ChoiceFile, Measured
from neox_hf.kernels.fused_product import TILES, FusedChoices, fused_choices_on, lies_well, quack_version
from tests.kernels.elementwise_cases import written_out_gelu
from tests.kernels.quack_stand_in import DSLBaseError, Epilogues

DEVICE = "NVIDIA H200"
TOKENS, HIDDEN, INNER = 20, 48, 64
QUICKEST = "128x192 2x1"
KIND = "product, gelu erf float32 20x48x64"


def file_in(folder, version="0.6.5"):
    path = folder / "fused_products" / "NVIDIA_H200.json"
    return ChoiceFile(path, DEVICE, "quack", version, TILES.__contains__)


def quickest(text):
    """ms of everything that is timed; all of it runs once, that of `text` last."""

    def medians(computes, rounds, calls):
        for each in sorted(computes, key=lambda each: each == text):
            computes[each]()
        return {each: 1.0 if each is None else 0.5 if each == text else 2.0 for each in computes}

    return medians


@pytest.fixture
def quack(monkeypatch):
    """quack, asked about products of any size; of the tiles for GELU behind a product, one is quickest."""
    ends = Epilogues()
    for module in (gelu_product, residual_product):
        monkeypatch.setattr(module, "is_chosen", lambda backend, a, b: backend != "torch")
    monkeypatch.setattr(fused_product, "epilogues", lambda: ends)
    monkeypatch.setattr(gelu_product, "epilogues", lambda: ends)
    monkeypatch.setattr(residual_product, "epilogues", lambda: ends)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(measured_choice, "medians", quickest(QUICKEST))
    return ends


@pytest.fixture
def choices(quack, tmp_path, monkeypatch):
    choices = FusedChoices(file_in(tmp_path))
    monkeypatch.setattr(fused_product, "fused_choices_on", lambda device: choices)
    return choices


def values(*shape, scale=1.0, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed)) * scale


def forward(backend="triton", form="erf", x=None):
    x = values(2, TOKENS // 2, HIDDEN) if x is None else x
    weight, bias = values(INNER, HIDDEN, scale=0.1), values(INNER)
    return gelu_product.gelu_product(x, weight, bias, form, backend), (x, weight, bias)


@pytest.mark.parametrize("form", ["erf", "tanh"])
def test_gelu_behind_a_product(form, choices, quack):
    (z, y), (x, weight, bias) = forward(form=form)
    exact = x @ weight.t()
    torch.testing.assert_close(z, exact)
    torch.testing.assert_close(y, written_out_gelu(exact, bias, form), rtol=1e-5, atol=1e-5)
    end = getattr(quack, f"{form}_gelu")
    assert set(end.tiles) == set(gelu_product.FORWARD[form].tiles)
    end.tiles.clear()
    forward(form=form)
    assert end.tiles == [QUICKEST]


@pytest.mark.parametrize("form", ["erf", "tanh"])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("sums", [None, torch.float32])
def test_gelu_backward_behind_a_product(form, again, sums, choices, quack, monkeypatch):
    monkeypatch.setattr(measured_choice, "medians", quickest("128x160 1x2"))
    dout, weight = values(2, 70, HIDDEN), values(HIDDEN, INNER, scale=0.1)  # of more rows than a tile has
    z, bias = values(2, 70, INNER), values(INNER)
    dz, dbias, y = gelu_product.gelu_product_backward(dout, weight, z, bias, form, sums, again, "triton")
    leaves = [each.double().requires_grad_() for each in (z, bias)]
    value = written_out_gelu(*leaves, form)
    exact = torch.autograd.grad(value, leaves, dout.double() @ weight.double())
    torch.testing.assert_close(dz.double(), exact[0], rtol=1e-5, atol=1e-5)
    if sums is None:
        assert dbias.numel() == 0
    else:
        torch.testing.assert_close(dbias.double(), exact[1], rtol=1e-4, atol=1e-4)
    assert y.shape == (value.shape if again else (0,))
    if again:
        torch.testing.assert_close(y.double(), value.detach(), rtol=1e-5, atol=1e-5)
    assert getattr(quack, f"{form}_gelu_backward{'_again' if again else ''}").tiles[-1] == "128x160 1x2"


def test_the_sum_behind_a_product(choices, quack, monkeypatch):
    monkeypatch.setattr(measured_choice, "medians", quickest("192x128 1x2"))
    y, weight = values(2, TOKENS // 2, INNER), values(HIDDEN, INNER, scale=0.1)
    stream, branch = (values(2, TOKENS // 2, HIDDEN, seed=seed) for seed in (1, 2))
    biases = values(HIDDEN, seed=3), values(HIDDEN, seed=4)
    out = residual_product.residual_product(y, weight, stream, branch, *biases, "triton")
    torch.testing.assert_close(out, y @ weight.t() + stream + branch + biases[0] + biases[1], rtol=1e-5, atol=1e-5)
    assert quack.residual.tiles[-1] == "192x128 1x2"


def test_what_was_found_is_remembered(choices, quack, tmp_path, monkeypatch):
    forward()
    said = json.loads(file_in(tmp_path).path.read_text())
    assert (said["quack"], said["products"]) == ("0.6.5", {KIND: {"algorithm": QUICKEST, "plain_ms": 1.0, "ms": 0.5}})
    later = FusedChoices(file_in(tmp_path))
    monkeypatch.setattr(fused_product, "fused_choices_on", lambda device: later)
    monkeypatch.setattr(fused_product, "measure", None)
    quack.erf_gelu.tiles.clear()
    forward(x=values(19, HIDDEN))  # of the same kind
    assert quack.erf_gelu.tiles == [QUICKEST]
    assert file_in(tmp_path, version="0.6.6").read() == {}


def test_it_is_computed_apart_where_that_is_quickest(choices, quack, monkeypatch):
    monkeypatch.setattr(measured_choice, "medians", quickest("none"))
    forward()
    quack.erf_gelu.tiles.clear()
    forward()
    assert quack.erf_gelu.tiles == []
    assert choices.measured == {KIND: Measured(None, 1.0, 1.0)}


@pytest.mark.parametrize("reason", [DSLBaseError("no such layout"), RuntimeError("out of registers")])
def test_a_tile_that_fails_is_left_out(reason, choices, quack, caplog):
    quack.erf_gelu.fails[QUICKEST] = reason
    (_, y), (x, weight, bias) = forward()
    torch.testing.assert_close(y, written_out_gelu(x @ weight.t(), bias, "erf"), rtol=1e-5, atol=1e-5)
    assert f"{KIND} is not computed by tiles of {QUICKEST}: {type(reason).__name__}: {reason}" in caplog.text
    assert choices.measured == {KIND: Measured(None, 1.0, 1.0)}


@pytest.mark.parametrize("off", [1.0, torch.nan])
def test_a_tile_that_computes_something_else_is_left_out(off, choices, quack, caplog):
    quack.erf_gelu.off[QUICKEST] = off
    (z, _), (x, weight, _) = forward()
    torch.testing.assert_close(z, x @ weight.t())
    assert f"{KIND} is not computed by tiles of {QUICKEST}: it is" in caplog.text
    assert choices.measured[KIND].algorithm is None


def test_values_that_are_not_finite_tell_nothing(choices, quack):
    x = values(TOKENS, HIDDEN)
    x[0, 0] = torch.inf
    forward(x=x)
    assert choices.measured == choices.tiles == {}
    forward(x=values(TOKENS, HIDDEN))
    assert choices.measured[KIND].algorithm == QUICKEST


def test_nothing_is_measured_while_a_graph_is_captured(choices, quack, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    forward()
    assert quack.erf_gelu.tiles == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    forward()
    assert quack.erf_gelu.tiles[-1] == QUICKEST


def test_without_room_to_measure_it_is_computed_apart(choices, quack, monkeypatch, caplog):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(fused_product, "measure", out_of_memory)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            forward()
    assert caplog.text.count(f"{KIND} is computed apart: no room") == 1
    assert choices.measured == {}


def test_what_lies_badly_is_computed_apart(choices, quack):
    forward(x=values(TOKENS, HIDDEN + 1)[:, 1:])
    forward(x=values(TOKENS, 2 * HIDDEN)[:, ::2])
    assert quack.erf_gelu.tiles == []
    assert lies_well(values(TOKENS, 2 * HIDDEN)[:, :HIDDEN])
    assert lies_well(values(TOKENS, HIDDEN).t())


def test_torch_is_left_alone_where_it_was_asked_for(choices, quack):
    forward(backend="torch")
    assert quack.erf_gelu.tiles == []


@pytest.mark.parametrize(
    ("device", "capability", "version", "there"),
    [
        ("cpu", None, "0.6.5", False),
        ("cuda", (8, 0), "0.6.5", False),
        ("cuda", (9, 0), None, False),
        ("cuda", (9, 0), "0.7.0", False),
        ("cuda", (9, 0), "0.6.5", True),
    ],
)
def test_quack_is_asked_on_hopper_in_a_version_that_was_tried(
    device, capability, version, there, tmp_path, monkeypatch
):
    monkeypatch.setenv("NEOX_HF_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICE)
    monkeypatch.setattr(fused_product, "quack_version", lambda: version)
    assert (fused_choices_on.__wrapped__(torch.device(device)) is not None) == there


def test_the_version_is_that_of_what_is_installed(monkeypatch):
    assert quack_version.__wrapped__() is None
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.6.5" if name == "quack-kernels" else None)
    assert quack_version.__wrapped__() == "0.6.5"


def test_epilogues_are_imported_when_they_are_needed(monkeypatch):
    imported = SimpleNamespace()
    monkeypatch.setattr(fused_product.importlib, "import_module", lambda name: imported)
    assert fused_product.epilogues.__wrapped__() is imported


@pytest.mark.parametrize("product", [*gelu_product.FORWARD.values(), *gelu_product.BACKWARD.values()])
def test_every_tile_is_known(product):
    assert set(product.tiles) <= set(TILES)
    assert {TILES[text].text for text in product.tiles} == set(product.tiles)


def test_an_unknown_tile_is_no_algorithm(tmp_path):
    file = file_in(tmp_path)
    file.path.parent.mkdir()
    entry = {"algorithm": "64x64 1x1", "plain_ms": 1.0, "ms": 0.5}
    file.path.write_text(json.dumps({"format": 2, "quack": "0.6.5", "products": {KIND: entry}}))
    assert file.read() == {}


def test_shapes_are_known_without_computing():
    with torch.device("meta"):
        x, weight, bias = torch.empty(2, 5, 8), torch.empty(12, 8), torch.empty(12)
        z, y = gelu_product.gelu_product(x, weight, bias, "erf", "torch")
        dz, dbias, again = gelu_product.gelu_product_backward(
            x, weight.t(), z, bias, "erf", torch.float32, True, "torch"
        )
        out = residual_product.residual_product(y, weight.t(), x, x, bias[:8], bias[:8], "torch")
    assert (z.shape, y.shape, dz.shape, dbias.shape, again.shape) == ((2, 5, 12),) * 3 + ((12,), (2, 5, 12))
    assert out.shape == x.shape
