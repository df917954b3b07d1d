"""Memory of each rank at its peak: what lies there between steps, and what the passes keep.

Counted is what torch's allocator hands out. A process has about half a GiB more for CUDA itself, and its messages'
buffers; where layers run as CUDA graphs, the graphs' pools hold their activations, which the allocator then counts as
reserved and not as allocated.

Activations are what autograd keeps of a block, with the Triton kernels (`kernels/`): each line of `_kept_by_layer` is a
`save_for_backward` there. H hidden, F inner width of the MLP, N heads.
"""

from dataclasses import dataclass

from neox_hf.kernels.chunked_losses import KERNEL_BYTES_AT_ONCE, default_chunk
from neox_hf.planning.job import Job
from neox_hf.training.deepspeed_config import LIVE_ELEMENTS, REDUCE_ELEMENTS

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """GiB on one rank. Of what is there at all times: weights (in fp8, in eight bits too), gradients, and the
    optimizer's masters and moments. Of the passes: `activations` kept for the backward pass, of all micro-batches that
    are under way; `layer`, what one layer's backward pass adds; `loss`, what head and loss take at the same time;
    `messages`, buffers of gradients and gathered weights. Before the first pass: `start`, what DeepSpeed's masters
    take more until they are halved.

    gradients_stay: they are there in the forward pass too. Else each comes when activations go.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    layer: float
    loss: float
    messages: float
    start: float
    gradients_stay: bool

    @property
    def peak(self) -> float:
        """GiB at the fullest moment: the turn from forward to backward or, without gradients there, the end; or the
        start of a resumed run."""
        turn = self.activations + max(self.layer, self.loss)
        if self.gradients_stay:
            turn += self.gradients
        later = self.gradients + max(self.layer, self.start)
        return self.weights + self.optimizer + self.messages + max(turn, later)


def memory_of_stages(job: Job) -> list[RankMemory]:
    """The memory of a rank of each pipeline stage. Ranks of one stage are alike."""
    return [_memory(job, stage) for stage in range(job.topology.pipeline)]


def _memory(job: Job, stage: int) -> RankMemory:
    weights, gradients, optimizer = _bytes_between_steps(job, stage)
    under_way = min(job.topology.pipeline - stage, job.accumulation)
    passes = _activations(job, stage)
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": under_way * passes,
        "layer": _layer_at_work(job),
        "loss": _loss(job) if job.is_last(stage) else 0,
        "messages": _messages(job, stage),
        "start": _whole_masters(job, stage),
    }
    # One step of one micro-batch without buckets is the only one that begins without gradients.
    stay = job.accumulation > 1 or job.topology.data > 1 or job.zero_stage > 0
    return RankMemory(**{name: count / GIB for name, count in parts.items()}, gradients_stay=stay)


def _bytes_between_steps(job: Job, stage: int) -> tuple[float, float, float]:
    """Weights, gradients and optimizer; docs/parallelism.md has the table for bf16."""
    parameters, replicas, precision = job.held[stage], job.topology.data, job.precision
    weights = precision.weights.itemsize * parameters / (replicas if job.zero_stage >= 3 else 1)
    if precision.fp8:
        weights += 2 * job.matrices(stage)  # once by rows and once by columns
    if precision.autocast:
        weights += job.product_bytes * job.matrices(stage)  # autocast remembers what it has cast
    gradients = job.gradient_bytes * parameters / (replicas if job.zero_stage >= 2 else 1)
    state = 2 * precision.weights.itemsize
    if precision.master:
        state = 10 if job.halves_masters else 12
    optimizer = 0 if job.offloads else state * parameters / (replicas if job.steps_parts else 1)
    return weights, gradients, optimizer


def _whole_masters(job: Job, stage: int) -> float:
    """Bytes that masters take before they are halved (`training.halved_master`), beyond what is left of them."""
    at_once = job.steps_at_once and (job.topology.splits_model or job.zero_stage == 1)
    return 2 * job.held[stage] / job.topology.data if at_once else 0


def _activations(job: Job, stage: int) -> float:
    """Bytes that one micro-batch leaves for its backward pass."""
    hidden = job.config.hidden_size
    kept = job.layers[stage] * _kept_by_layer(job)
    if job.is_last(stage):
        # What the last norm reads and gives, and the gradient of the latter, which the loss makes.
        kept += hidden * (job.residual_bytes / _sequence_ranks(job) + 2 * job.product_bytes)
    else:
        kept += hidden * job.residual_bytes / _sequence_ranks(job)  # the output, until its gradient comes
    return job.tokens * kept


def _kept_by_layer(job: Job) -> float:
    """Bytes of one token."""
    if job.recompute == "full":
        return job.config.hidden_size * job.residual_bytes / _sequence_ranks(job)
    return _streams(job) / _sequence_ranks(job) + _inside(job) / job.topology.tensor


def _sequence_ranks(job: Job) -> int:
    """Ranks that share what lies outside the split matrices."""
    return job.topology.tensor if job.topology.sequence else 1


def _streams(job: Job) -> float:
    """Bytes of one token that every rank keeps, unless the sequence is split: the input of each norm; its output."""
    config, sums = job.config, 1 if job.config.use_parallel_residual else 2
    kept = sums * config.hidden_size * job.residual_bytes
    if job.precision.fp8:
        return kept + 2 * config.hidden_size  # both outputs in eight bits, transposed
    return kept + (2 * config.hidden_size * job.product_bytes if job.recompute == "none" else 0)


def _inside(job: Job) -> float:
    """Bytes of one token that the ranks of a tensor group share out."""
    config, width = job.config, job.product_bytes
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    attention = 4 * hidden * width + 4 * heads  # q, k, v, output, fp32 log-sums of its softmax
    if config._attn_implementation == "eager":
        attention += heads * job.seq_length * width  # the weights
    if job.precision.fp8:
        return attention + hidden + inner * width  # the output once more in eight bits; what GELU reads
    if job.recompute == "none":
        return attention + 2 * inner * width  # what GELU reads and gives
    return attention + inner * width + (0 if job.kernels_make_again else hidden * width)


def _layer_at_work(job: Job) -> float:
    """Bytes of one layer in its backward pass: the gradients of what GELU gave and read, and what is made again."""
    config, width = job.config, job.product_bytes
    split = 2 * config.intermediate_size * width
    if job.recompute == "selective" and not job.precision.fp8:
        split += config.intermediate_size * width
    if job.recompute == "full":
        split += 4 * config.hidden_size * width + 2 * config.intermediate_size * width
    gathered = 2 * config.hidden_size * width if job.topology.sequence else 0
    return job.tokens * (split / job.topology.tensor + gathered + config.hidden_size * job.residual_bytes)


def _loss(job: Job) -> float:
    """Bytes of head and loss: the logits of a chunk, and the gradient of the head, which is made at once."""
    width, rows, hidden = job.product_bytes, job.rows, job.config.hidden_size
    chunk = default_chunk(job.tokens, rows, KERNEL_BYTES_AT_ONCE // width)
    logits = min(chunk, job.tokens) * rows * width
    adds = job.precision.master and (job.accumulation > 1 or job.topology.data > 1 or job.zero_stage == 1)
    return logits + (0 if adds else 4 * rows * hidden)


def _messages(job: Job, stage: int) -> float:
    """Bytes of DeepSpeed's buffers."""
    if job.zero_stage < 2:
        return 0
    gradients = min(2 * REDUCE_ELEMENTS, job.held[stage]) * 4  # one bucket travels while the next is filled
    gathered = min(LIVE_ELEMENTS, job.held[stage]) * job.precision.weights.itemsize if job.zero_stage == 3 else 0
    return gradients + gathered
