"""Every layout trains as one process does: the same loss and gradient norm at each of 20 steps, to 1e-5 (fp32)."""

from itertools import cycle, product

import pytest

from tests.layouts import FEW_LAYERS, LAYERS, LAYOUTS, Curve, largest_difference, train_curve
from tests.runs import Runs

TOLERANCE = 1e-5
SAMPLES_AT_ONCE = {1: 8, 4: 2}
"""Micro-batch over all replicas, by accumulation: a step has 8 samples."""

OPTIONS = list(product(("parallel", "sequential"), ("untied", "tied"), (1, 4)))
COVERING = [OPTIONS[3], OPTIONS[6], OPTIONS[5], OPTIONS[0]]
"""Every pair of options, in four combinations, so ordered that four tensor ranks get a single micro-batch."""

SPLIT = [layout for layout in LAYOUTS if layout != "single"]
DEALT = dict(zip(SPLIT, cycle(COVERING), strict=False))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("curves"))


@pytest.fixture(scope="module")
def singles() -> dict[tuple, Curve]:
    """Curves of one process, by options and layers."""
    return {}


def overrides(options: tuple[str, str, int], replicas: int) -> list[str]:
    residual, tied, accumulation = options
    return [
        f"model.use_parallel_residual={str(residual == 'parallel').lower()}",
        f"model.tie_word_embeddings={str(tied == 'tied').lower()}",
        f"train.per_device_train_batch_size={SAMPLES_AT_ONCE[accumulation] // replicas}",
    ]


def layers_of(layout: str) -> int:
    """Four for stages alone, which are then of two layers or of one; else as few as there may be."""
    tensor, stages = (LAYOUTS[layout].get(size, 1) for size in ("tensor", "pipeline"))
    return LAYERS if stages > 1 and tensor == 1 else max(FEW_LAYERS, stages)


def curve_of(layout: str, options: tuple, layers: int, runs: Runs) -> Curve:
    sizes, name = LAYOUTS[layout], "-".join(map(str, (layout, *options, layers)))
    return train_curve(sizes, runs, *overrides(options, sizes.get("data", 1)), layers=layers, name=name)


def follow_one_process(
    layout: str, options: tuple, runs: Runs, singles: dict[tuple, Curve], layers: int = LAYERS
) -> None:
    if (options, layers) not in singles:
        singles[options, layers] = curve_of("single", options, layers, runs)
    curve = curve_of(layout, options, layers, runs)
    assert largest_difference(curve, singles[options, layers]) < TOLERANCE
    assert curve[-1][0] < 0.9 * curve[0][0], "nothing was learnt, so nothing was compared"


@pytest.mark.parametrize("layout", SPLIT)
def test_layout_follows_one_process(layout, runs, singles):
    follow_one_process(layout, DEALT[layout], runs, singles, layers_of(layout))


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
