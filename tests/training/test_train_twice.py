"""`train()` a second time in one process, on from the first one's checkpoint: as if it were one run."""

import re

import pytest

from tests.runs import Runs
from tests.training.test_pipeline_runs import OPTIMIZER, different, run, tensors
from tests.training.test_step_at_once_runs import by_kernel

SETTINGS = ("train.lr_decay_steps=8", "train.gradient_accumulation_steps=1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("train-twice"))


def train_twice(rank: int) -> None:
    """Four steps, and the others by a second `train()`; of the first one's optimizer nothing is left then."""
    import gc
    import weakref

    from neox_hf.training.trainer import NeoXTrainer

    train = NeoXTrainer.train

    def in_two(trainer, *args):
        steps, trainer.args.max_steps = trainer.args.max_steps, 4
        train(trainer, *args)
        trainer.args.max_steps = steps
        first = weakref.ref(trainer.engine.optimizer)
        found = train(trainer, "latest")
        gc.collect()
        print("the first optimizer is", "there" if first() else "gone")
        return found

    NeoXTrainer.train = in_two


def check(runs: Runs, layout: str, precision: str, **halves: object) -> None:
    name = re.sub("[^a-z0-9]+", "-", f"{layout}-{precision}{'-halves' if halves else ''}")
    how = (layout, f"train.precision={precision}", *SETTINGS)
    run(runs, f"{name}-whole", *how, **halves)
    run(runs, name, *how, **({**halves, "then": train_twice} if halves else {"prepare": train_twice}))
    assert runs.message(name).count("'train_runtime'") == 2
    gone = layout != "parallel.zero_stage=0"  # there HF goes on with the one it has
    assert ["the first optimizer is gone" in runs.message(name, rank) for rank in range(2)] == [gone, gone]
    whole, twice = (runs.folder / of / "checkpoint-8" for of in (f"{name}-whole", name))
    for files in ("model*.safetensors", OPTIMIZER):
        assert different(tensors(whole, files), tensors(twice, files)) == []


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        ("parallel.zero_stage=1", "bf16"),
        ("parallel.zero_stage=3", "fp32"),
        ("parallel.pipeline=2", "bf16"),
        pytest.param("parallel.zero_stage=2", "fp32", marks=pytest.mark.slow),
        pytest.param("parallel.zero_stage=3", "bf16", marks=pytest.mark.slow),
        pytest.param("parallel.tensor=2", "bf16", marks=pytest.mark.slow),
        pytest.param("parallel.zero_stage=0", "bf16", marks=pytest.mark.slow),
    ],
)
def test_a_second_train_goes_on_bit_for_bit(runs, layout, precision):
    check(runs, layout, precision)


@pytest.mark.parametrize("layout", ["parallel.zero_stage=1", pytest.param("parallel.tensor=2", marks=pytest.mark.slow)])
def test_masters_in_halves_do_so_too(runs, layout):
    check(runs, layout, "bf16", prepare=by_kernel)
