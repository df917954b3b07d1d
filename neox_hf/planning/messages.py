"""Seconds of messages that no computation hides.

An all-reduce of b bytes among n ranks takes 2 (n - 1) / n x b at a link's bandwidth, gathering or scattering half of
that. Where messages travel is told in docs/architecture.md, "Where ranks meet in the block".
"""

from neox_hf.parallel.leaving import LAST_PART
from neox_hf.planning.devices import Device
from neox_hf.planning.job import Job

EXPOSED = 0.5
"""Of gradients that travel beside the backward pass: they take bandwidth and processors from it. An estimate: two H200
lost 27 ms of a step to messages of 17 ms and to all else that two ranks wait for
(docs/measurements/layouts_h200_x2.md)."""


def layer_seconds(job: Job, device: Device, hides: float) -> float:
    """A tensor group's messages in one layer, forward and backward.

    hides: seconds of weight gradients, beside which the backward pass's message to the norms travels.
    """
    if job.topology.tensor == 1:
        return 0.0
    half = _half_all_reduce(job, device)
    joins = 1 if job.config.use_parallel_residual else 2
    if job.topology.copies and job.topology.tensor == 2 and not job.topology.sequence:
        return _layer_seconds_by_copies(job, device, hides, joins)
    if job.topology.sequence:
        # Forward: both column linears gather, each sum is scattered. Backward: each sum's gradient is gathered; beside
        # the weights' gradients inputs are gathered again and their gradients scattered.
        plain, beside = 2 + 2 * joins, 4
    else:
        plain, beside = 2 * joins, 2 * joins
    if job.recompute == "full":
        plain += 2 + joins if job.topology.sequence else 2 * joins
    return plain * half + max(beside * half - hides, 0.0)


def _layer_seconds_by_copies(job: Job, device: Device, hides: float, joins: int) -> float:
    """Of two devices that send each other their summands. What adds the forward pass's to the stream reads both; the
    backward pass's have a pass of their own."""
    message = 2 * _half_all_reduce(job, device)
    by_parts = job.config.use_parallel_residual and not job.config.hidden_dropout
    forward = joins * message / (LAST_PART if by_parts else 1)
    if job.recompute == "full":
        forward += joins * message
    addition = 3 * job.tokens * job.config.hidden_size * job.product_bytes / (device.bandwidth_gbps * 1e9)
    return forward + max(joins * message - hides, 0.0) + joins * addition


def _half_all_reduce(job: Job, device: Device) -> float:
    """The hidden states of a micro-batch, gathered or scattered in a tensor group."""
    ranks = job.topology.tensor
    size = job.tokens * job.config.hidden_size * job.product_bytes
    return device.latency / 2 + (ranks - 1) / ranks * size / (device.between(ranks) * 1e9)


def head_seconds(job: Job, device: Device, chunks: int) -> float:
    """A tensor group's message behind the embedding or before the head; two of a few numbers for each chunk of loss."""
    if job.topology.tensor == 1:
        return 0.0
    return 2 * _half_all_reduce(job, device) + 2 * chunks * device.latency


def hop_seconds(job: Job, device: Device) -> float:
    """Hidden states from a stage to the next, and their gradient back: a stage waits for what it sends."""
    if job.topology.pipeline == 1:
        return 0.0
    size = job.tokens * job.config.hidden_size * job.residual_bytes
    if job.topology.sequence:
        size /= job.topology.tensor
    link = device.between(job.topology.world_size) * 1e9  # the slowest hop sets the pace
    return 2 * (device.latency + size / link)


def partition_seconds(job: Job, device: Device, stage: int) -> float:
    """What ZeRO-2 and 3 send in every micro-batch: gradients to their owners, weights from them in both passes."""
    if job.zero_stage < 2 or job.topology.data == 1:
        return 0.0
    per_parameter = 4 + (2 * job.precision.weights.itemsize if job.zero_stage == 3 else 0)
    return EXPOSED * _among_replicas(job, device, per_parameter * job.held[stage])


def gradient_seconds(job: Job, device: Device, stage: int) -> float:
    """Once a step: gradients are summed over the replicas, each its part's where each steps one, and the new weights
    of parts gathered."""
    if job.topology.data == 1:
        return 0.0
    gradients = _among_replicas(job, device, job.gradient_bytes * job.held[stage])
    weights = _among_replicas(job, device, job.precision.weights.itemsize * job.held[stage])
    if job.zero_stage == 0:
        return EXPOSED * (gradients + weights if job.steps_parts else 2 * gradients)
    seconds = weights if job.zero_stage < 3 else 0.0
    if job.zero_stage == 1 and job.steps_at_once:
        seconds += gradients  # each its part, when all is done
    elif job.zero_stage == 1:
        seconds += (1.0 if job.topology.splits_model else EXPOSED) * 2 * gradients  # a pipeline's when all is done
    return seconds


def _among_replicas(job: Job, device: Device, size: float) -> float:
    """Gathering or scattering `size` bytes in a data group."""
    ranks = job.topology.data
    link = device.between(job.topology.tensor * ranks) * 1e9
    return device.latency + (ranks - 1) / ranks * size / link
