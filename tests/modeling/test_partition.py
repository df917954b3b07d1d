"""Which layers each stage holds: every layer once, no stage empty, the dearest stage as cheap as can be."""

from itertools import combinations, pairwise

import pytest

from neox_hf.errors import TopologyError
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.partition import balanced_bounds, stage_bounds


def config(layers: int, vocab_size: int = 128) -> GPTNeoXConfig:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 128}
    return GPTNeoXConfig(num_hidden_layers=layers, vocab_size=vocab_size, **sizes)


def every_partition(items: int, stages: int) -> list[list[int]]:
    return [[0, *cuts, items] for cuts in combinations(range(1, items), stages - 1)]


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("costs", [[1] * 8, [1] * 7 + [5], [1] * 7 + [40], [9, 1, 1, 1, 4, 4, 1, 2]])
def test_no_other_partition_is_better(costs, stages):
    def judged(bounds: list[int]) -> tuple[int, int]:
        shares = [sum(costs[start:stop]) for start, stop in pairwise(bounds)]
        return max(shares), sum(share**2 for share in shares)

    best = min(judged(bounds) for bounds in every_partition(8, stages))
    assert judged(balanced_bounds(costs, stages)) == best


def test_the_head_counts_as_what_it_costs():
    # A layer of 32 wide has 12 x 32^2 weights in products; this head has as many as two of them.
    assert stage_bounds(config(10, vocab_size=24 * 32), 2) == [0, 6, 10]
    assert stage_bounds(config(10, vocab_size=24 * 32), 2, "layers") == [0, 5, 10]


def test_a_20b_model_on_four_stages():
    sizes = {"hidden_size": 6144, "num_attention_heads": 64, "intermediate_size": 24576, "vocab_size": 50432}
    assert stage_bounds(GPTNeoXConfig(num_hidden_layers=44, **sizes), 4) == [0, 11, 22, 33, 44]


def test_bounds_that_are_given():
    assert stage_bounds(config(4), 2, [0, 3, 4]) == [0, 3, 4]


@pytest.mark.parametrize("bounds", [[0, 4, 4], [1, 4], [0, 4], [0, 2, 5], [0, 1, 2, 4]])
def test_bounds_that_are_no_partition(bounds):
    with pytest.raises(TopologyError, match=r"does not deal 4 layers to 2 stages; .* such as \[0, 2, 4\]"):
        stage_bounds(config(4), 2, bounds)


def test_more_stages_than_layers():
    with pytest.raises(TopologyError, match=r"parallel\.pipeline=4 stages need at least as many layers"):
        stage_bounds(config(3), 4)
    with pytest.raises(TopologyError, match="4 stages need at least as many layers; there are 3"):
        stage_bounds(config(3), 4, [0, 1, 2, 3, 3])
