"""Seconds that go by memory: the block's kernels at one pass each, the optimizer, and gaps between kernels.

Bytes are of one token and layer, of a stack without dropout. H hidden, F inner width of the MLP.
"""

from neox_hf.planning.devices import Device
from neox_hf.planning.job import Job

REACHED = 0.88
"""Share of a copy's bandwidth at which the block's kernels run. Source: the profile in docs/measurements/step_h200.md,
where GELU takes 8.4 ms for 7.5 at a copy's rate, residual sums 1.7 for 1.5, norms 3.5 for 3.0."""

GAP_SECONDS = 6e-6
"""Between two kernels the device starts and ends. Source: the same profile: 4 of 240 ms idle at 28 kernels a layer."""

KERNELS_OF_LAYER = 28
"""9 forward (4 products, norms, rotary, attention, GELU, sum), 19 backward (8 products, biases' sums in two parts)."""

FP8_CASTS = 32
"""Bytes / H of casts that are passes of their own: each of six tensors is read once and written both ways; GELU's casts
are in its own passes."""


def kernel_seconds(job: Job, device: Device) -> float:
    """Norms, rotary, GELU, sums, and casts to eight bits, of one layer and micro-batch, forward and backward."""
    outside, inside = _outside_bytes(job), _inside_bytes(job)
    if job.topology.sequence:
        outside /= job.topology.tensor
    traffic = outside + inside / job.topology.tensor
    if job.recompute == "full":
        traffic *= 1.4  # the forward passes are two fifths of the traffic
    return job.tokens * traffic / (device.bandwidth_gbps * 1e9 * REACHED)


def _outside_bytes(job: Job) -> float:
    """Norms and residual sums, which ranks of a tensor group each compute unless they split the sequence."""
    hidden, stream, width = job.config.hidden_size, job.residual_bytes, job.product_bytes
    norms = 4 * stream + 4 * width  # x and its outputs; their gradients, x, and the stream's gradient in and out
    sums = 2 * stream + 3 * width  # the stream in and out, both branches; the biases' gradient
    if not job.config.use_parallel_residual:
        norms, sums = norms + 4 * stream, sums + 2 * stream + width  # a stream for each branch
    made_again = 2 * width if job.recompute == "selective" and not job.precision.fp8 else 0
    return hidden * (norms + sums + made_again)


def _inside_bytes(job: Job) -> float:
    """Rotary, GELU, casts."""
    hidden, inner, width = job.config.hidden_size, job.config.intermediate_size, job.product_bytes
    # The rotated part of q and k in place; dq, dk, dv into dqkv.
    rotary = hidden * width * (4 * job.config.rotary_pct + 6)
    gelu = inner * width * 5  # in, out; in, its gradient, out
    if job.recompute == "selective" and not job.precision.fp8:
        gelu += inner * width
    return rotary + gelu + (FP8_CASTS * hidden if job.precision.fp8 else 0)


def gap_seconds(job: Job) -> float:
    """Of one layer and micro-batch."""
    again = 9 if job.recompute == "full" else 0
    return (KERNELS_OF_LAYER + again) * GAP_SECONDS


def optimizer_seconds(job: Job, device: Device, stage: int) -> float:
    """Norm of the gradients and AdamW, once a step; the host's step where it is offloaded."""
    held = job.held[stage]
    shard = held / (job.topology.data if job.steps_parts else 1)
    if job.offloads:
        host = 28 / device.host_memory_gbps + (job.gradient_bytes + job.precision.weights.itemsize) / device.host_gbps
        return shard * host / 1e9
    traffic = shard * _step_bytes(job) + (held * 4 if job.zero_stage and job.steps_at_once else 0)  # zeros
    if job.precision.fp8:
        traffic += 4 * job.matrices(stage)  # weights to eight bits, both ways
    return traffic / (device.bandwidth_gbps * 1e9 * REACHED)


def _step_bytes(job: Job) -> int:
    """Read and written for each parameter that a rank steps, of its gradients' norm too."""
    if job.steps_at_once:
        return 32  # weights, remainders and moments in and out (24), gradients twice (8): one kernel, and the norm
    if job.zero_stage or job.precision.master:
        # torch's step over fp32 (28); the norm (4); clipping (8); gradients cleared (4); masters to weights (6).
        return 50
    return 8 * job.precision.weights.itemsize  # weights and moments in and out, gradients twice
