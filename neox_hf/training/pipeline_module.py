"""A `Stage` in the form that DeepSpeed's pipeline engine drives."""

import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from neox_hf.modeling.stage import Stage
from neox_hf.parallel.shards import shards_of
from neox_hf.parallel.topology import Topology


class StageModule(PipelineModule):
    """DeepSpeed's pipeline of one layer a stage, where that layer is this rank's `Stage`.

    DeepSpeed's own partition, seeds and activation checkpointing are left out: the stage has its layers, and the layers
    checkpoint themselves. Constructed on every rank of the world, since it makes process groups.
    """

    def __init__(self, stage: Stage, topology: Topology) -> None:
        self._place = topology
        sizes = {"num_pp": topology.pipeline, "num_dp": topology.data, "num_mp": topology.tensor}
        super().__init__(
            [stage if number == topology.pipeline_rank else _elsewhere for number in range(topology.pipeline)],
            topology=PipeModelDataParallelTopology(**sizes),
            loss_fn=stage.loss,
        )
        # Each rank's shard has its own share of the gradient norm; what is whole counts once.
        for parameter in shards_of(stage):
            parameter.tensor_model_parallel = True

    def _partition_layers(self, method: str = "one a stage") -> None:
        self.parts = list(range(self._place.pipeline + 1))
        self._set_bounds(self._place.pipeline_rank, self._place.pipeline_rank + 1)

    def _index_tied_modules(self) -> dict[str, dict]:
        """The embedding that the first stage shares with the last one's head, and who holds it."""
        stage, place = self.forward_funcs[0], self._place
        if place.pipeline == 1 or not stage.model.config.tie_word_embeddings:
            return {}
        ends = [(group[0], group[-1]) for group in place.axis_ranks("pipeline")]
        mine = next((ranks for ranks in ends if place.rank in ranks), None)
        groups = {ranks: dist.new_group(list(ranks)) for ranks in ends}
        if mine is None:
            return {}
        holder: nn.Module = stage.embed_in if stage.is_first else stage.lm_head
        holder.weight.ds_pipe_replicated = place.rank != mine[0]  # the norm counts it once
        return {"embedding": {"ranks": list(mine), "group": groups[mine], "weight_attr": ["weight"], "module": holder}}

    def get_tied_weights_and_groups(self) -> list[tuple["_SharedWeight", dist.ProcessGroup]]:
        return [(_SharedWeight(tied["module"].weight), tied["group"]) for tied in self.tied_comms.values()]


class _SharedWeight:
    """A tied weight as the engine reads it when it adds up the gradients of its holders."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight

    @property
    def grad(self) -> Tensor | None:
        """Where gradients accumulate in another dtype than the weight's, the engine would look in the wrong place."""
        accumulated = getattr(self.weight, "grad_accum", None)
        return self.weight.grad if accumulated is None else accumulated

    @property
    def _hp_grad(self) -> Tensor | None:
        return self.weight._hp_grad


def _elsewhere(_: object) -> None:
    raise AssertionError("a stage of another rank was called")
