"""Seconds of a training step: each part at the rate that the device sustains for it, in series.

Parts of one micro-batch on one stage are matrix products, attention, the memory traffic of the block's kernels, head
and loss, the gaps between kernels, and messages that nothing hides. A step is its micro-batches through all stages, and
then gradients between replicas and the optimizer. H is the hidden size, S the tokens of a sequence.

Left out: data, which is made ahead; and Python, which small models wait for where no CUDA graphs run their layers.
"""

from dataclasses import dataclass, fields

from neox_hf.kernels.chunked_losses import KERNEL_BYTES_AT_ONCE, default_chunk
from neox_hf.modeling.accounting import flops_per_token
from neox_hf.planning.devices import Device
from neox_hf.planning.job import Job
from neox_hf.planning.messages import (
    gradient_seconds,
    head_seconds,
    hop_seconds,
    layer_seconds,
    partition_seconds,
)
from neox_hf.planning.traffic import gap_seconds, kernel_seconds, optimizer_seconds

T = 1e12


@dataclass(frozen=True, kw_only=True)
class Micro:
    """Seconds of one micro-batch, forward and backward, on one stage."""

    products: float
    attention: float
    kernels: float
    head: float
    gaps: float
    messages: float

    @property
    def seconds(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step on all devices.

    seconds: of the step. parts: the seconds of it by what they go to, on the slowest stage. bubble: the share of the
    passes' time in which a stage waits for another, on average.
    """

    seconds: float
    parts: dict[str, float]
    bubble: float
    tokens_per_second: float
    tflops_per_device: float


def step_of(job: Job, device: Device) -> Step:
    """What a step takes on as many of `device` as the job has ranks."""
    stages = [_micro(job, device, stage) for stage in range(job.topology.pipeline)]
    slowest = max(range(len(stages)), key=lambda stage: stages[stage].seconds)
    # One micro-batch goes through all stages; behind it they come at the slowest stage's pace.
    passes = sum(stage.seconds for stage in stages) + (job.accumulation - 1) * stages[slowest].seconds
    if job.splits_backward:  # and back without the gradients of weights, but for the first stage
        passes -= _product_seconds(job, device) / 3 * sum(job.layers[1:])
    busy = job.accumulation * sum(stage.seconds for stage in stages) / len(stages)
    ends = {
        "gradients": max(gradient_seconds(job, device, stage) for stage in range(len(stages))),
        "optimizer": max(optimizer_seconds(job, device, stage) for stage in range(len(stages))),
    }
    micro = {part.name: job.accumulation * getattr(stages[slowest], part.name) for part in fields(Micro)}
    waits = passes - job.accumulation * stages[slowest].seconds
    seconds = passes + sum(ends.values())
    per_second = job.tokens * job.topology.data * job.accumulation / seconds
    rate = per_second * flops_per_token(job.config, job.seq_length) / job.topology.world_size / T
    return Step(
        seconds=seconds,
        parts={**micro, "bubble": waits, **ends},
        bubble=1 - busy / passes,
        tokens_per_second=per_second,
        tflops_per_device=rate,
    )


def _micro(job: Job, device: Device, stage: int) -> Micro:
    layers, again = job.layers[stage], job.recompute == "full"
    forward = _product_seconds(job, device) / 3
    messages = layers * layer_seconds(job, device, hides=_weight_gradients(job, device))
    messages += hop_seconds(job, device) + partition_seconds(job, device, stage)
    if stage in (0, job.topology.pipeline - 1):
        messages += head_seconds(job, device, _chunks(job) if job.is_last(stage) else 0)
    return Micro(
        products=layers * forward * (4 if again else 3),
        attention=layers * _attention_seconds(job, device) * (9 / 7 if again else 1),
        kernels=layers * kernel_seconds(job, device),
        head=_head_seconds(job, device) if job.is_last(stage) else 0.0,
        gaps=layers * gap_seconds(job),
        messages=messages,
    )


def _product_seconds(job: Job, device: Device) -> float:
    """Matrix products of a layer, forward and backward: 6 operations for each element and token."""
    hidden, inner = job.config.hidden_size, job.config.intermediate_size
    elements = (4 * hidden**2 + 2 * hidden * inner) / job.topology.tensor
    rate = device.matmul_tflops[1 if job.precision.fp8 else job.product_bytes]
    return 6 * elements * job.tokens / (rate * T)


def _weight_gradients(job: Job, device: Device) -> float:
    """Seconds of those products behind which a layer's backward message travels: of what reads the norms."""
    hidden, inner = job.config.hidden_size, job.config.intermediate_size
    share = (3 * hidden**2 + hidden * inner) / (4 * hidden**2 + 2 * hidden * inner)
    return _product_seconds(job, device) / 3 * share


def _attention_seconds(job: Job, device: Device) -> float:
    """Causal attention of a layer: 2 S H operations a token forward, 5 S H backward."""
    operations = 7 * job.seq_length * job.config.hidden_size * job.tokens / job.topology.tensor
    rate = device.attention_at(job.config.head_size)
    if job.product_bytes == 4:
        rate *= device.matmul_tflops[4] / device.matmul_tflops[2]
    return operations / (rate * T)


def _head_seconds(job: Job, device: Device) -> float:
    """Head and loss: three products, and a pass over the logits."""
    products = 6 * job.rows * job.config.hidden_size * job.tokens / (device.matmul_tflops[job.product_bytes] * T)
    return products + 2 * job.product_bytes * job.rows * job.tokens / (device.bandwidth_gbps * 1e9)


def _chunks(job: Job) -> int:
    """Chunks of tokens in which the loss is computed."""
    chunk = default_chunk(job.tokens, job.rows, KERNEL_BYTES_AT_ONCE // job.product_bytes)
    return -(-job.tokens // chunk)
