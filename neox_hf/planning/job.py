"""What memory and speed depend on, read from a recipe for a world of some size."""

from dataclasses import dataclass
from itertools import pairwise

from neox_hf.errors import RecipeError
from neox_hf.modeling.accounting import rank_parameters
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.partition import stage_bounds
from neox_hf.modeling.recompute import Recompute
from neox_hf.parallel.parts import has_parts
from neox_hf.parallel.topology import Topology
from neox_hf.training.dry_run import known_config, parameters_in_words
from neox_hf.training.optimizers import FUSED
from neox_hf.training.precision import Precision, precision_of
from neox_hf.training.recipe import Recipe

ON_CUDA = "bf16"
"""What `precision: auto` is there. A plan is for a GPU, wherever it is made."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One step of training, laid out.

    zero_stage: the one that runs. micro_batch: samples that a rank takes at a time, `accumulation` times a step.
    held: parameters in memory of each rank, by stage. layers: of each stage.
    step_kernel: whether one kernel may step the optimizer.
    """

    config: GPTNeoXConfig
    topology: Topology
    precision: Precision
    zero_stage: int
    offloads: bool
    recompute: Recompute
    micro_batch: int
    accumulation: int
    seq_length: int
    held: tuple[int, ...]
    layers: tuple[int, ...]
    step_kernel: bool

    @classmethod
    def of(cls, recipe: Recipe, world_size: int) -> "Job":
        """What `recipe` comes to on `world_size` devices.

        Raises:
            RecipeError: the recipe alone does not decide the model's sizes.
            TopologyError: it does not fit that world.
        """
        topology, parallel = recipe.topology(world_size), recipe.parallel
        config = known_config(recipe)
        if config is None:
            raise RecipeError(
                "memory and speed follow from the parameters, which the recipe alone does not tell "
                f"({parameters_in_words(recipe, None)}); plan one that has model.name or model.vocab_size"
            )
        split = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "partition": parallel.partition}
        bounds = stage_bounds(config, parallel.pipeline, parallel.partition)
        precision = ON_CUDA if recipe.train.precision == "auto" else recipe.train.precision
        return cls(
            config=config,
            topology=topology,
            precision=precision_of(precision),
            zero_stage=parallel.effective_zero_stage,
            offloads=parallel.offload == "optimizer",
            recompute=_recompute(recipe.train.activation_checkpointing),
            micro_batch=recipe.train.per_device_train_batch_size,
            accumulation=recipe.accumulation_steps(world_size),
            seq_length=recipe.data.seq_length,
            held=tuple(ranks[0] for ranks in rank_parameters(config, **split)),
            layers=tuple(stop - start for start, stop in pairwise(bounds)),
            step_kernel=recipe.train.optim == FUSED and config.kernels != "torch",
        )

    @property
    def tokens(self) -> int:
        """Of one micro-batch."""
        return self.micro_batch * self.seq_length

    @property
    def residual_bytes(self) -> int:
        """Of an element of the residual stream, which has the dtype of the weights."""
        return self.precision.weights.itemsize

    @property
    def product_bytes(self) -> int:
        """Of an element that a matrix product reads or writes."""
        return 2 if self.precision.autocast else self.precision.weights.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Of an element of the summed gradients."""
        return 4 if self.precision.master or self.zero_stage else self.precision.weights.itemsize

    @property
    def rows(self) -> int:
        """Words of the head on each rank, about: padding is left out."""
        return -(-self.config.vocab_size // self.topology.tensor)

    @property
    def sums_gradients(self) -> bool:
        """Whether products add weights' gradients up; elsewhere DeepSpeed takes them as autograd brings them."""
        return self.zero_stage <= 1 and not self.offloads

    @property
    def kernels_make_again(self) -> bool:
        """Whether `selective` is the kernels' form; elsewhere it is torch's, which keeps one product more."""
        return self.sums_gradients and self.precision.weights.itemsize == 2 and not self.precision.scaled

    @property
    def steps_at_once(self) -> bool:
        """Whether one kernel steps fp32 masters, kept in halves: our engine's, split models' and ZeRO-1's."""
        return self.step_kernel and self._has_summed_masters

    @property
    def halves_masters(self) -> bool:
        """Whether of a master only what its bf16 weight is short of it is kept between steps."""
        by_deepspeed = self.topology.splits_model or self.zero_stage > 0
        return self._has_summed_masters and (self.step_kernel or not by_deepspeed)

    @property
    def steps_parts(self) -> bool:
        """Whether each replica keeps and steps a part of the optimizer's state: ZeRO's, and, over masters, ours, which
        cuts the layers' matrices where their elements divide."""
        divide = has_parts(self.config.hidden_size**2, self.topology.data)
        return self.zero_stage > 0 or (self._has_summed_masters and divide)

    @property
    def splits_backward(self) -> bool:
        """Whether stages send their gradients back before they compute those of weights (`training.split_backward`)."""
        alone = self.topology.pipeline > 1 == self.topology.tensor
        return self._has_summed_masters and alone and self.recompute == "none"

    @property
    def _has_summed_masters(self) -> bool:
        return self.sums_gradients and self.precision.master and not self.precision.scaled

    def matrices(self, stage: int) -> int:
        """Elements of the matrices of a stage's layers on each rank."""
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        return self.layers[stage] * (4 * hidden**2 + 2 * hidden * inner) // self.topology.tensor

    def is_last(self, stage: int) -> bool:
        """Whether the stage has head and loss."""
        return stage == self.topology.pipeline - 1


def _recompute(value: str | bool | None) -> Recompute:
    """`true` is HF's for `full`."""
    if value == "selective":
        return "selective"
    return "full" if value in (True, "full") else "none"
