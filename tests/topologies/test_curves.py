"""Every layout trains as one process does: the same loss and gradient norm at each of 20 steps, to 1e-5 (fp32)."""

from itertools import cycle, product

import pytest

from tests.layouts import LAYOUTS, Curve, largest_difference, train_curve
from tests.runs import Runs

TOLERANCE = 1e-5
SAMPLES_AT_ONCE = {1: 8, 4: 2}
"""Micro-batch over all replicas, by accumulation: a step has 8 samples."""

OPTIONS = list(product(("parallel", "sequential"), ("untied", "tied"), (1, 4)))
COVERING = [OPTIONS[0], OPTIONS[3], OPTIONS[5], OPTIONS[6]]
"""Every pair of options, in four combinations."""

SPLIT = [layout for layout in LAYOUTS if layout != "single"]
DEALT = dict(zip(SPLIT, cycle(COVERING), strict=False))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("curves"))


@pytest.fixture(scope="module")
def singles() -> dict[tuple, Curve]:
    """Curves of one process, by options."""
    return {}


def overrides(options: tuple[str, str, int], replicas: int) -> list[str]:
    residual, tied, accumulation = options
    return [
        f"model.use_parallel_residual={str(residual == 'parallel').lower()}",
        f"model.tie_word_embeddings={str(tied == 'tied').lower()}",
        f"train.per_device_train_batch_size={SAMPLES_AT_ONCE[accumulation] // replicas}",
    ]


def name_of(layout: str, options: tuple) -> str:
    return "-".join(map(str, (layout, *options)))


def follow_one_process(layout: str, options: tuple, runs: Runs, singles: dict[tuple, Curve]) -> None:
    if options not in singles:
        singles[options] = train_curve({}, runs, *overrides(options, 1), name=name_of("single", options))
    sizes = LAYOUTS[layout]
    curve = train_curve(sizes, runs, *overrides(options, sizes.get("data", 1)), name=name_of(layout, options))
    assert largest_difference(curve, singles[options]) < TOLERANCE
    assert curve[-1][0] < 0.9 * curve[0][0], "nothing was learnt, so nothing was compared"


@pytest.mark.parametrize("layout", SPLIT)
def test_layout_follows_one_process(layout, runs, singles):
    follow_one_process(layout, DEALT[layout], runs, singles)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)))
@pytest.mark.parametrize("layout", SPLIT)
def test_every_layout_with_every_option(layout, options, runs, singles):
    follow_one_process(layout, options, runs, singles)


@pytest.mark.parametrize(
    "layout",
    [
        "pp2",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("tp2-sp", "dp2", "zero1", "zero2", "zero3", "pp2-tp2")),
    ],
)
def test_bf16_stays_as_near_as_one_process_does(layout, runs, singles):
    """bf16 rounds differently in another order of sums; how much that may matter is what it costs one process."""
    if "bf16" not in singles:
        singles["bf16"] = train_curve({}, runs, "train.precision=bf16", name="single-bf16")
        singles["fp32"] = train_curve({}, runs, name="single-fp32")
    allowed = largest_difference(singles["bf16"], singles["fp32"])
    curve = train_curve(LAYOUTS[layout], runs, "train.precision=bf16", name=f"{layout}-bf16")
    assert largest_difference(curve, singles["bf16"]) < allowed
