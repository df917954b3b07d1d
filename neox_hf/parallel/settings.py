"""The `parallel:` section of a recipe."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """Sizes of the parallel axes; whatever is left of the world is data parallel.

    tensor: ranks that share each matrix. pipeline: ranks that share the stack of layers.
    sequence: shard norms and residuals along the sequence inside a tensor group.
    messages: how a tensor group sums, and neighbouring stages send: `auto` copies into the other's memory where these
        are two devices with NVLink between them, which leaves the multiprocessors to the products; `backend` has NCCL
        do it everywhere.
    zero_stage: what data parallelism shards: 0 in bf16 and fp8 the optimizer's state and else nothing, 1 that state,
        2 gradients too, 3 weights too.
    offload: `optimizer` keeps the optimizer's state in the host's memory and steps there.
    partition: how layers are dealt to stages: stages of like parameter count, of like length, or the first layer of
        each stage and then the number of layers, so `[0, 5, 12]` is two stages of 5 and 7.
    """

    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    messages: Literal["auto", "backend"] = "auto"
    zero_stage: int = 0
    offload: Literal["none", "optimizer"] = "none"
    partition: Literal["parameters", "layers"] | list[int] = "parameters"

    @property
    def splits_model(self) -> bool:
        """Whether one replica takes more than one process: DeepSpeed's pipeline engine then runs the steps."""
        return self.tensor > 1 or self.pipeline > 1

    @property
    def effective_zero_stage(self) -> int:
        """The stage that runs. A split model always has stage 1: at 0 the pipeline engine clips by a norm that leaves
        most parameters out."""
        return max(1, self.zero_stage) if self.splits_model else self.zero_stage

    @property
    def needs_deepspeed(self) -> bool:
        return self.effective_zero_stage > 0
