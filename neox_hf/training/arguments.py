"""The `train:` section of a recipe: every field of HF's TrainingArguments, and the few it lacks."""

import logging
from dataclasses import dataclass, field
from typing import Annotated, Literal

from transformers import TrainingArguments

from neox_hf.training.field_types import settle_values
from neox_hf.training.precision import Precision, precision_asked, precision_of

logger = logging.getLogger(__name__)

EPOCHS_BY_DEFAULT = TrainingArguments.num_train_epochs


@dataclass
class NeoXTrainingArguments(TrainingArguments):
    """`TrainingArguments` for GPT-NeoX pretraining.

    precision: `fp32`; `amp` (fp32 weights under bf16 autocast); `bf16` (bf16 weights and activations with fp32
        master weights, moments and gradient accumulation); `pure_bf16` (weights, moments and gradients all bf16: half
        the memory and traffic of the optimizer, and updates below a weight's last bit are lost); `fp16` (as bf16 with
        a dynamic loss scale; DeepSpeed on CUDA alone); `fp8` (as bf16, but the products of the blocks' linears are in
        eight bits; one GPU or replicas of the model, of CUDA capability 8.9 or above). `auto` is what HF's `bf16` or
        `fp16` asks for (`amp`, `fp16`), else bf16 on CUDA and fp32 elsewhere.
    activation_checkpointing: what the backward pass computes again: `none`, `full` blocks, or, `selective`, what is
        cheap to compute and large to keep. `true` and `false` are transformers' words for `full` and `none`.
    cuda_graphs: run the layers as CUDA graphs, one launch for all of them each way, for devices that are faster than
        the host asks for kernels. `auto`: where a tensor group shares the layers, and for small micro-batches.
    lr_decay_style: GPT-NeoX schedule; when set it replaces `lr_scheduler_type`.
    lr_warmup_fraction: warm-up, as a fraction of `lr_decay_steps`. min_lr: floor of the schedule.
    lr_decay_steps: steps over which the rate decays; `max_steps` when unset.
    save_schedule: when to save: `every` (each `save_steps`), `none`, `pythia` (0, 1, 2, 4 ... 512, then every
        1000), or a list of steps.
    save_in_background: write a checkpoint while training goes on; only copying it to the host's memory stops a step.
    z_loss: weight of each token's squared log-sum-exp in the loss that is trained on and logged, not in that of
        evaluation.
    nan_policy: what a loss or gradient that is not finite does: stop the run, or skip the step.
    max_skipped_steps: consecutive skipped steps after which the run stops all the same.
    peak_tflops: dense peak or sustained rate of one device in TFLOP/s, for MFU; looked up when unset.
    """

    precision: Literal["auto", "fp32", "amp", "bf16", "pure_bf16", "fp16", "fp8"] = "auto"
    activation_checkpointing: Annotated[str | None, Literal["none", "full", "selective"] | bool | None] = None
    cuda_graphs: Annotated[str, Literal["auto"] | bool] = "auto"
    lr_decay_style: Literal["constant", "linear", "cosine", "exponential"] | None = None
    lr_warmup_fraction: float = 0.01
    lr_decay_steps: int | None = None
    min_lr: float = 0.0
    save_schedule: Annotated[str, Literal["every", "none", "pythia"] | list[int]] = "every"
    save_in_background: bool = True
    z_loss: float = 0.0
    nan_policy: Literal["raise", "skip"] = "raise"
    max_skipped_steps: int = 10
    peak_tflops: float | None = None

    # Defaults that differ from HF's: a stream is endless, and a NaN is never hidden from the log.
    max_steps: int = 1000
    logging_nan_inf_filter: bool = False
    logging_first_step: bool = True
    report_to: None | str | list[str] = field(default_factory=list)  # noqa: RUF036 (HF's parser looks at the second)
    include_num_input_tokens_seen: str | bool = "no"
    average_tokens_across_devices: bool = True
    ddp_find_unused_parameters: bool | None = False
    remove_unused_columns: bool | None = False

    def __post_init__(self) -> None:
        settle_values(self, NeoXTrainingArguments.__annotations__)
        self.precision = precision_asked(self.precision, bf16=self.bf16, fp16=self.fp16)
        if self.numeric.scaled and not self.deepspeed:
            raise ValueError(
                "precision='fp16' needs DeepSpeed, whose dynamic loss scale keeps gradients from vanishing; give a "
                "configuration as deepspeed=, or choose bf16, amp or fp32"
            )
        if self.save_schedule != "every":
            self.save_strategy = "no"  # the schedule's own callback asks for its steps
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith("perplexity"):
            self.greater_is_better = False  # HF takes more of anything for better that does not end in `loss`
        if self.max_steps > 0 and self.num_train_epochs != EPOCHS_BY_DEFAULT:
            told = "num_train_epochs=%s is not used: max_steps=%d ends the run; give max_steps=-1 to train by epochs"
            logger.warning(told, self.num_train_epochs, self.max_steps)
        # To HF a flag means autocast; with DeepSpeed it means the dtype of the weights, and must agree with its config.
        self.bf16 = self.numeric.autocast or (bool(self.deepspeed) and self.precision == "bf16")
        self.fp16 = bool(self.deepspeed) and self.precision == "fp16"
        if self.activation_checkpointing == "none":
            self.activation_checkpointing = False  # HF takes any text for a yes
        super().__post_init__()
        # HF would take it from the environment, where `accelerate launch` puts what a host's configuration says.
        self.mixed_precision = "bf16" if self.bf16 else "fp16" if self.fp16 else "no"

    @property
    def recompute(self) -> Literal["none", "full", "selective"]:
        """What the backward pass computes again."""
        if self.activation_checkpointing == "selective":
            return "selective"
        return "full" if self.activation_checkpointing else "none"

    @property
    def effective_nan_policy(self) -> Literal["raise", "skip"]:
        """`nan_policy`, but under a dynamic loss scale always to skip: it finds its size by overflowing."""
        return "skip" if self.numeric.scaled else self.nan_policy

    @property
    def keeps_master(self) -> bool:
        """Whether our optimizer keeps fp32 master weights; under DeepSpeed, DeepSpeed does."""
        return self.numeric.master and not self.deepspeed

    @property
    def numeric(self) -> Precision:
        """What `precision` means for weights, arithmetic and the optimizer."""
        return precision_of(self.precision)
