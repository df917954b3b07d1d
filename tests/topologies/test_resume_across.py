"""A checkpoint of one layout goes on in another: the curve of the run that was never interrupted, to 1e-5 (fp32)."""

import shutil
from itertools import permutations

import pytest
import torch
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM as StockForCausalLM

from neox_hf import GPTNeoXForCausalLM
from tests.layouts import FEW_LAYERS, LAYERS, LAYOUTS, Curve, largest_difference, train_curve
from tests.runs import Runs

TOLERANCE = 1e-5
SAVED_AT = 10
SETTINGS = (f"train.save_schedule=[{SAVED_AT}]",)
RESUMABLE = ["single", "tp2", "pp2", "zero1", "zero3", "pp2-tp2"]
PAIRS = list(permutations(RESUMABLE, 2))
COVERING = [
    ("single", "pp2-tp2"),
    ("pp2-tp2", "zero3"),
    ("zero3", "tp2"),
    ("tp2", "pp2"),
    ("pp2", "zero1"),
    ("zero1", "single"),
]
"""Each layout saves once and resumes once."""

TIED = "model.tie_word_embeddings=true"
VARIED = {
    ("pp2-tp2", "zero3"): {"changed": ("parallel.offload=optimizer",), "name": "offloaded"},
    ("tp2", "pp2"): {"changed": ("train.per_device_train_batch_size=4",), "name": "micro-batch"},
    ("pp2", "zero1"): {"overrides": (TIED,)},
}
"""Pairs that change something beside the layout, or hold in another model."""

BIT_EQUAL = ["single", "zero1", "pp2-tp2"]


class Interrupted:
    """Runs of each layout that were saved in their middle, made when first asked for."""

    def __init__(self, runs: Runs, layers: int) -> None:
        self.runs, self.layers = runs, layers
        self._curves: dict[str, Curve] = {}

    def curve(self, layout: str, *overrides: str) -> Curve:
        """The uninterrupted curve of `layout`; its checkpoint stays in `saved-...`."""
        name = name_of("saved", layout, *overrides)
        if name not in self._curves:
            self._curves[name] = self._train(layout, *overrides, name=name)
        return self._curves[name]

    def checkpoint(self, layout: str, *overrides: str):
        self.curve(layout, *overrides)
        return self.runs.folder / name_of("saved", layout, *overrides) / f"checkpoint-{SAVED_AT}"

    def resume(self, saved: str, layout: str, *overrides: str, changed: tuple[str, ...] = (), name: str = "") -> Curve:
        """The curve of a run of `layout` that goes on where `saved` was at SAVED_AT; `changed` is its own recipe."""
        name = name or name_of("resumed", saved, layout, *overrides)
        folder = self.runs.folder / name
        shutil.copytree(self.checkpoint(saved, *overrides), folder / f"checkpoint-{SAVED_AT}")
        return self._train(layout, *overrides, *changed, name=name)

    def _train(self, layout: str, *overrides: str, name: str) -> Curve:
        return train_curve(LAYOUTS[layout], self.runs, *SETTINGS, *overrides, layers=self.layers, name=name)


def name_of(*parts: str) -> str:
    return "-".join(parts).replace("=", "").replace(".", "")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Interrupted:
    """Of few layers, one a stage."""
    return Interrupted(Runs(tmp_path_factory.mktemp("resumes")), FEW_LAYERS)


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Interrupted:
    """Of two layers a stage, for what is slow anyway."""
    return Interrupted(Runs(tmp_path_factory.mktemp("deep")), LAYERS)


def goes_on(interrupted: Interrupted, saved: str, layout: str, overrides: tuple[str, ...] = (), **how) -> None:
    whole = interrupted.curve("single", *overrides)
    resumed = interrupted.resume(saved, layout, *overrides, **how)
    assert largest_difference(resumed, whole) < TOLERANCE


@pytest.mark.parametrize(("saved", "layout"), COVERING)
def test_resumes_in_another_layout(saved, layout, interrupted):
    """One of the six with the optimizer's state on the host, one at another micro-batch, one with tied embeddings."""
    goes_on(interrupted, saved, layout, **VARIED.get((saved, layout), {}))


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "layout"), PAIRS)
def test_every_layout_resumes_in_every_other(saved, layout, deep):
    goes_on(deep, saved, layout)


@pytest.mark.slow
def test_resumes_with_the_optimizer_on_the_host(deep):
    goes_on(deep, "tp2", "zero2", changed=("parallel.offload=optimizer",), name="offloaded-2")


@pytest.mark.slow
def test_resumes_with_tied_embeddings(deep):
    goes_on(deep, "pp2", "tp2", (TIED,))


@pytest.mark.slow
def test_resumes_with_another_micro_batch(deep):
    changed = ("train.per_device_train_batch_size=4",)
    goes_on(deep, "zero3", "pp2", changed=changed, name="micro-batch-after-zero3")


@pytest.mark.parametrize("layout", BIT_EQUAL)
def test_the_same_layout_resumes_bit_equal(layout, interrupted):
    assert interrupted.resume(layout, layout) == interrupted.curve(layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", RESUMABLE)
def test_every_layout_resumes_bit_equal(layout, deep):
    assert deep.resume(layout, layout) == deep.curve(layout)


@pytest.mark.parametrize("layout", RESUMABLE)
def test_checkpoint_loads_in_stock_transformers(layout, interrupted):
    folder = interrupted.checkpoint(layout)
    assert (folder / "state").is_dir()
    tokens = torch.arange(64).view(2, 32)
    models = [cls.from_pretrained(folder).eval() for cls in (StockForCausalLM, GPTNeoXForCausalLM)]
    with torch.no_grad():
        stock, ours = (model(tokens).logits for model in models)
        of_one_process = StockForCausalLM.from_pretrained(interrupted.checkpoint("single")).eval()(tokens).logits
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)
    torch.testing.assert_close(stock, of_one_process, rtol=0, atol=1e-3)
