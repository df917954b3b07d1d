"""Which layers each pipeline stage holds."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from neox_hf.errors import TopologyError
from neox_hf.modeling.configuration import GPTNeoXConfig

Partition = str | Sequence[int]
"""`parameters`, `layers`, or bounds: the first layer of each stage and then the number of layers."""


def stage_bounds(config: GPTNeoXConfig, stages: int, partition: Partition = "parameters") -> list[int]:
    """First layer of each stage, then the number of layers: stage s holds the layers from bounds[s] to bounds[s + 1].

    `parameters` shares out the work: a layer costs its matrices; the head, which the last stage computes, is a matrix
    product too, while looking an embedding up costs next to nothing. `layers` shares out the layers alone.

    Raises:
        TopologyError: there are fewer layers than stages, or the bounds given are no partition of them.
    """
    layers, hidden = config.num_hidden_layers, config.hidden_size
    if not isinstance(partition, str):
        return check_bounds(list(partition), layers, stages)
    if layers < stages:
        raise TopologyError(
            f"parallel.pipeline={stages} stages need at least as many layers; model.num_hidden_layers={layers}"
        )
    costs = [4 * hidden**2 + 2 * hidden * config.intermediate_size] * layers
    if partition == "parameters":
        costs[-1] += config.vocab_size * hidden
    return balanced_bounds(costs, stages)


def check_bounds(bounds: list[int], layers: int, stages: int) -> list[int]:
    """The bounds, if every stage has a layer and every layer a stage.

    Raises:
        TopologyError: it is not so.
    """
    grows = all(start < stop for start, stop in pairwise(bounds))
    if len(bounds) != stages + 1 or bounds[0] != 0 or bounds[-1] != layers or not grows:
        raise TopologyError(
            f"parallel.partition={bounds} does not deal {layers} layers to {stages} stages; it wants {stages + 1} "
            f"growing numbers from 0 to {layers}, such as {balanced_bounds([1] * layers, stages)}"
            if layers >= stages
            else f"parallel.partition={bounds}: {stages} stages need at least as many layers; there are {layers}"
        )
    return bounds


def balanced_bounds(costs: Sequence[int], stages: int) -> list[int]:
    """Bounds that deal items in their order to `stages` stages, one at least to each, so that the dearest stage is as
    cheap as can be, and among those partitions the one with the evenest stages."""
    upto = [0, *accumulate(costs)]
    limit = _least_maximum(upto, stages)
    # best[stop]: (sum of squared costs, bounds) of the first items up to `stop` in the stages dealt so far.
    best = {0: (0, [0])}
    for stage in range(1, stages + 1):
        reached = {}
        for stop in range(stage, len(costs) - (stages - stage) + 1):
            ways = [
                (squares + (upto[stop] - upto[start]) ** 2, [*bounds, stop])
                for start, (squares, bounds) in best.items()
                if start < stop and upto[stop] - upto[start] <= limit
            ]
            if ways:
                reached[stop] = min(ways)
        best = reached
    return best[len(costs)][1]


def _least_maximum(upto: list[int], stages: int) -> int:
    """The smallest cost of the dearest stage; `upto` are the costs' running sums."""
    least = {0: 0}
    for _ in range(stages):
        least = {
            stop: min(max(dearest, upto[stop] - upto[start]) for start, dearest in least.items() if start < stop)
            for stop in range(min(least) + 1, len(upto))
        }
    return least[len(upto) - 1]
