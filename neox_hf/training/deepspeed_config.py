"""The one writer of DeepSpeed's configuration: what a recipe's sections come to in DeepSpeed's terms.

Every value is written out. DeepSpeed, Accelerate and transformers each fill in what they find missing or "auto", by
formulas that know no pipeline or tensor ranks. `train_batch_size` alone is left out, for the same reason: DeepSpeed
derives it from its own data-parallel size.
"""

from typing import Any, Protocol

from neox_hf.parallel.settings import ParallelSettings
from neox_hf.parallel.topology import Topology
from neox_hf.training.precision import precision_here

REDUCE_ELEMENTS = 100_000_000
"""Gradients per message. Messages wait for nothing else, so this bounds the buffer rather than the speed."""

GATHER_ELEMENTS = 200_000_000
"""Updated weights per message, after the step."""

LIVE_ELEMENTS = 1_000_000_000
"""Stage 3: whole weights that may be in memory at once, of layers at work, about to be, or soon needed again."""

PREFETCH_ELEMENTS = 50_000_000
"""Stage 3: weights that are gathered ahead of their layer."""

KEPT_ELEMENTS = 100_000
"""Stage 3: tensors below this, biases and norms, stay whole on every rank."""

NEVER = 10**9
"""Steps between two prints of DeepSpeed's own, which the trainer's log makes superfluous."""


class StepSettings(Protocol):
    """What is read of `train:`; the recipe's section and `NeoXTrainingArguments` both have it."""

    per_device_train_batch_size: int
    max_grad_norm: float
    precision: str


def deepspeed_config(
    train: StepSettings, parallel: ParallelSettings, topology: Topology, accumulation: int
) -> dict[str, Any] | None:
    """DeepSpeed's configuration for a run, or None where DeepSpeed has no part in it.

    Args:
        accumulation: micro-batches that one rank takes in a step.
    """
    if not parallel.needs_deepspeed:
        return None
    return {
        "train_micro_batch_size_per_gpu": train.per_device_train_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": float(train.max_grad_norm),
        "steps_per_print": NEVER,
        # Its stopwatch waits for the device at every micro-batch; the trainer has its own.
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero_section(parallel, topology),
        # Each tensor rank sends its own hidden states on. Sharing the message out would mix them up where they differ,
        # under sequence parallelism.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        **_precision_sections(precision_here(train.precision)),
    }


def _precision_sections(precision: str) -> dict[str, Any]:
    """Gradients are accumulated and reduced in fp32 whatever the weights are."""
    fp32_gradients = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    if precision == "bf16":
        # Each gradient is added up in fp32 and dropped as soon as it is there: half the passes over memory, and no copy
        # in bf16 of all of them.
        return {"bf16": {"enabled": True, "immediate_grad_update": True}, **fp32_gradients}
    if precision == "fp16":
        # From 2^16 the scale halves at each overflow and doubles after 1000 steps without one.
        scaling = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}
        return {"fp16": {"enabled": True, **scaling, "min_loss_scale": 1}, **fp32_gradients}
    assert precision == "fp32", f"{precision} has no DeepSpeed configuration"
    return fp32_gradients


def _zero_section(parallel: ParallelSettings, topology: Topology) -> dict[str, Any]:
    stage = parallel.effective_zero_stage
    section: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": REDUCE_ELEMENTS,
        "allgather_partitions": True,
        "allgather_bucket_size": GATHER_ELEMENTS,
        # A pipeline's backward passes leave no room to overlap with, and its engine refuses it.
        "overlap_comm": topology.data > 1 and not topology.splits_model,
    }
    if stage == 3:
        section |= {
            "stage3_max_live_parameters": LIVE_ELEMENTS,
            "stage3_max_reuse_distance": LIVE_ELEMENTS,
            "stage3_prefetch_bucket_size": PREFETCH_ELEMENTS,
            "stage3_param_persistence_threshold": KEPT_ELEMENTS,
            # Weights are saved one tensor at a time, never gathered as a whole.
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    if parallel.offload == "optimizer":
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return section
