from collections import Counter

import pytest

from neox_hf.data.hashing import WeightedChoice, is_held_out, mix, permuted


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000])
def test_permuted_is_a_permutation_that_depends_on_its_key(size):
    orders = [[permuted(index, size, seed, 0) for index in range(size)] for seed in (1, 2)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert size < 10 or orders[0] != orders[1] != list(range(size))


def test_the_order_is_pinned_so_that_a_resumed_run_meets_the_same_one():
    assert mix(1, 2, 3) == mix(1, 2, 3) != mix(3, 2, 1)
    assert [permuted(index, 10, 1234, 0, 0) for index in range(10)] == PINNED_ORDER


def test_permuted_needs_no_table_for_a_very_large_size():
    size = 10**15
    assert len({permuted(index, size, 7) for index in range(1000)}) == 1000


def test_held_out_share_and_that_a_larger_fraction_keeps_the_smaller_set():
    small = {index for index in range(20_000) if is_held_out(0.01, 0, index)}
    large = {index for index in range(20_000) if is_held_out(0.02, 0, index)}
    assert 140 < len(small) < 260
    assert small < large


# Among them such that the golden ratio times them is nearly whole, or nearly a simple fraction.
@pytest.mark.parametrize("streams", [1, 2, 13, 48, 72, 144, 600, 610, 960])
@pytest.mark.parametrize("weights", [[1.0, 3.0, 4.0], [9.0, 1.0], [1.0, 1.0], [99.0, 1.0]])
def test_every_prefix_has_each_source_in_its_share_also_in_each_stream(weights, streams):
    choose = WeightedChoice(weights, streams)
    shares = [weight / sum(weights) for weight in weights]
    counts = Counter()
    by_stream = [Counter() for _ in range(streams)]
    for sample in range(max(40 * streams, 5000)):
        source, stream = choose(sample), sample % streams
        counts[source] += 1
        by_stream[stream][source] += 1
        assert all(abs(counts[one] - (sample + 1) * share) < 7 for one, share in enumerate(shares))
        turns = sample // streams + 1
        assert all(abs(by_stream[stream][one] - turns * share) < 3.5 for one, share in enumerate(shares))


PINNED_ORDER = [8, 9, 5, 4, 1, 0, 2, 6, 3, 7]
