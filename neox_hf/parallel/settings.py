"""The `parallel:` section of a recipe."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """Sizes of the parallel axes; whatever is left of the world is data parallel.

    tensor: ranks that share each matrix. pipeline: ranks that share the stack of layers.
    sequence: shard norms and residuals along the sequence inside a tensor group.
    zero_stage: how much of the optimizer state, gradients and weights data parallelism shards.
    """

    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    zero_stage: int = 0
