"""`train.torch_compile` changes no curve, whatever engine runs the layers, and compiles one of them for all."""

import pytest

from tests.layouts import Curve, largest_difference, train_curve
from tests.runs import Runs

COMPILED = "train.torch_compile_backend=aot_eager"  # traces and partitions as inductor does, and needs no C++ compiler
LAYERS = 12
"""More than the eight times that torch would compile one code anew before it gave up."""


def tell_graphs(rank: int) -> None:
    """Print how many graphs were made by the end of training."""
    import torch

    from neox_hf.training.trainer import NeoXTrainer

    train = NeoXTrainer.train

    def told(trainer, *args):
        found = train(trainer, *args)
        print("graphs:", torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return found

    NeoXTrainer.train = told


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def plain(runs) -> Curve:
    return train_curve({}, runs, layers=LAYERS)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_one_graph_serves_all_layers(runs, plain, recompute):
    overrides = (COMPILED, f"train.activation_checkpointing={recompute}")
    curve = train_curve({}, runs, *overrides, layers=LAYERS, name=recompute, prepare=tell_graphs)
    assert largest_difference(curve, plain) < 1e-5
    assert "graphs: 1\n" in runs.message(recompute)


@pytest.mark.parametrize(
    "layout", [{"data": 2}, {"tensor": 2}, {"data": 2, "zero_stage": 1}, {"data": 2, "zero_stage": 3}]
)
def test_the_same_curve_on_two_ranks(runs, plain, layout):
    assert largest_difference(train_curve(layout, runs, COMPILED, layers=LAYERS), plain) < 1e-5
