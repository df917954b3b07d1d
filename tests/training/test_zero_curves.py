"""ZeRO 1 to 3 on two ranks follow the curve of one process."""

import pytest

from tests.layouts import Curve, largest_difference, train_curve
from tests.runs import Runs

TOLERANCE = 1e-5
ZERO = {
    "stage 1": {"zero_stage": 1},
    "stage 2": {"zero_stage": 2},
    "stage 3": {"zero_stage": 3},
    "offloaded": {"zero_stage": 2, "offload": "optimizer"},
}
BF16 = "train.precision=bf16"
EACH_ALONE = "train.per_device_train_batch_size=1"
"""Four micro-batches in a step of two ranks instead of two."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def single(runs) -> Curve:
    return train_curve({}, runs)


@pytest.mark.slow  # tests/topologies has each stage once
@pytest.mark.parametrize("stage", ZERO)
def test_two_ranks_follow_one_process(runs, single, stage):
    curve = train_curve({"data": 2, **ZERO[stage]}, runs, EACH_ALONE)
    assert largest_difference(curve, single) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*ZERO, "stage 3, offloaded"])
@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("model", [[], ["model.tie_word_embeddings=true", "model.use_parallel_residual=false"]])
def test_every_stage_at_every_accumulation(tmp_path, stage, micro_batch, model):
    layout = ZERO.get(stage, {"zero_stage": 3, "offload": "optimizer"})
    own = Runs(tmp_path)
    overrides = [*model, f"train.per_device_train_batch_size={micro_batch}"]
    curve = train_curve({"data": 2, **layout}, own, *overrides)
    assert largest_difference(curve, train_curve({}, own, *model)) < TOLERANCE


def test_a_process_alone(runs, single):
    """Without a launcher, as on one GPU with offloading."""
    curve = train_curve(ZERO["offloaded"], runs, "train.activation_checkpointing=full")
    assert largest_difference(curve, single) < TOLERANCE


@pytest.fixture(scope="module")
def our_bf16(runs) -> Curve:
    """bf16 under our own accumulation and reduction, which are fp32."""
    return train_curve({"data": 2}, runs, EACH_ALONE, BF16, name="bf16-ours")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage 1", "stage 2", "stage 3"])
def test_bf16_accumulates_and_reduces_in_fp32(runs, our_bf16, stage):
    """Of two replicas and four micro-batches, the first step's norm is ours: bf16 sums would change its third digit.

    From then on the curves differ by bf16's rounding alone: at stage 3 a linear rounds once more before its bias.
    """
    curve = train_curve({"data": 2, **ZERO[stage]}, runs, EACH_ALONE, BF16, name=f"bf16-{stage}")
    assert curve[0] == pytest.approx(our_bf16[0], rel=1e-6)
    assert largest_difference(curve, our_bf16) < 1e-2
