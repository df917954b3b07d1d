"""Data parallelism that accumulates and reduces gradients in fp32, whatever the dtype of the weights.

torch's DistributedDataParallel reduces gradients in the dtype of the parameter, so bf16 weights would be averaged in
bf16. Here each parameter's `.grad` comes to lie in an fp32 view into a flat bucket; a bucket travels as soon as the
backward pass has filled it, while the rest of the backward pass still runs; or at its end, where more may follow what
has come: after two forward passes, and of parameters that stand in several places of the model. Where the optimizer
steps parts (`parts.py`), these get the mean gradients, and `.grad` of the parameters is no mean but in that part.
Nothing is cleared between steps: what comes first overwrites.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neox_hf.kernels.weight_gradient import SumInGrad, sum_in
from neox_hf.parallel.parts import Arrival, ParameterPart, ReplicaParts, pieces_of

BUCKET_ELEMENTS = 16 * 1024 * 1024


@dataclass
class _Bucket:
    """Gradients that travel in one message. `cuts`: of parameters that are cut, this replica's parts with their cuts of
    the views; a bucket has none or one for each view. `missing` counts those the running backward pass has yet to
    produce. may_leave_early: each parameter is told of once in the backward pass of one forward pass."""

    flat: Tensor
    views: list[tuple[nn.Parameter, Tensor]]
    cuts: list[tuple[ParameterPart, Tensor]]
    may_leave_early: bool = True
    missing: int = 0
    work: Arrival | None = field(default=None, repr=False)


def accumulate_gradients_in_fp32(module: nn.Module) -> None:
    """Sum each parameter's gradients in fp32, in `.grad`: those of linears by the products that make them, others after
    autograd has cast them."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.grad_dtype = torch.float32
            sum_in(parameter, SumInGrad())


class _SumInView(SumInGrad):
    """Sums in a bucket; the first product overwrites what the step before has left there."""

    def __init__(self, view: Tensor) -> None:
        super().__init__()
        self._view = view

    def place_for(self, weight: nn.Parameter) -> Tensor:
        return self._view


class DataParallel(nn.Module):
    """Replicas of `module` whose fp32 gradients are averaged over `group`.

    Args:
        module: the model; its parameters and buffers are broadcast from the group's first rank.
        group: ranks that hold replicas; None is the whole world.
        bucket_elements: gradients per message. Larger buckets use the network better, smaller ones overlap more.
        parts: of the group, what each replica steps; without them every replica is sent all gradients.
    """

    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup | None = None,
        bucket_elements: int = BUCKET_ELEMENTS,
        parts: ReplicaParts | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.group = group
        self.parts = parts
        self._synchronise = True
        self._passes = 0  # forward passes whose gradients are to come
        # NCCL divides as it reads; elsewhere that is a pass of its own.
        self._averages = dist.get_backend(group) == "nccl"
        accumulate_gradients_in_fp32(module)
        self._broadcast_replica()
        self._buckets = self._fill_buckets(bucket_elements)
        self._register_hooks()
        self.zero_grad()

    def _get_name(self) -> str:
        """That of the model itself. transformers asks for it to know whether labels are those of next tokens, and
        looks into other wrappers than this one."""
        adapted = hasattr(self.module, "get_base_model")  # by PEFT
        return (self.module.get_base_model() if adapted else self.module)._get_name()

    def forward(self, *args, **kwargs):
        self._passes += torch.is_grad_enabled()
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients accumulate locally; the first backward pass outside this context reduces their sum."""
        before, self._synchronise = self._synchronise, False
        try:
            yield
        finally:
            self._synchronise = before

    def zero_grad(self, set_to_none: bool = True) -> None:
        for bucket in self._buckets:
            bucket.missing = len(bucket.views)
            for parameter, _ in [*bucket.views, *bucket.cuts]:
                parameter.grad = None

    def _broadcast_replica(self) -> None:
        source = dist.get_global_rank(self.group, 0) if self.group is not None else 0
        for tensor in [*self.module.parameters(), *self.module.buffers()]:
            dist.broadcast(tensor.detach(), src=source, group=self.group)

    def _fill_buckets(self, bucket_elements: int) -> list[_Bucket]:
        # Reverse order of definition is roughly the order in which the backward pass produces gradients.
        trainable = [p for p in reversed(list(self.module.parameters())) if p.requires_grad]
        places = Counter(p for _, p in self.module.named_parameters(remove_duplicate=False))
        alike: dict[tuple, list[nn.Parameter]] = {}
        for parameter in trainable:
            is_cut = self.parts is not None and parameter in self.parts
            alike.setdefault((parameter.device, is_cut, places[parameter] == 1), []).append(parameter)
        return [
            _bucket_of(piece, self.parts if is_cut else None, stands_once)
            for (_, is_cut, stands_once), group in alike.items()
            for piece in pieces_of(group, bucket_elements)
        ]

    def _register_hooks(self) -> None:
        for bucket in self._buckets:
            for parameter, view in bucket.views:
                sum_in(parameter, _SumInView(view))
                parameter.register_post_accumulate_grad_hook(self._hook_for(bucket, view))

    def _hook_for(self, bucket: _Bucket, view: Tensor):
        def on_gradient(parameter: nn.Parameter) -> None:
            if parameter.grad is not view:  # the first one, which autograd has put where it liked
                parameter.grad = view.copy_(parameter.grad)
            if not self._synchronise:
                self._passes = 0
                return
            if bucket.work is not None:
                raise ValueError(
                    f"a gradient of {list(parameter.shape)} came after its bucket had left for the other replicas: the "
                    "module that has this parameter ran more than once. Call the model through DataParallel, which "
                    "counts, and not what is in it; or all backward passes but the last within no_sync()"
                )
            if all(other.missing == len(other.views) for other in self._buckets):
                torch.autograd.Variable._execution_engine.queue_callback(self._finish)
            bucket.missing -= 1
            if bucket.missing == 0 and bucket.may_leave_early and self._passes <= 1:
                self._reduce(bucket)

        return on_gradient

    def _reduce(self, bucket: _Bucket) -> None:
        for parameter, view in bucket.views:
            if parameter.grad is None:
                parameter.grad = view.zero_()
        if not self._averages:
            bucket.flat.div_(dist.get_world_size(self.group))
        operation = dist.ReduceOp.AVG if self._averages else dist.ReduceOp.SUM
        if bucket.cuts:
            pairs = [(cut, view) for (_, cut), (_, view) in zip(bucket.cuts, bucket.views, strict=True)]
            bucket.work = self.parts.start_reduction(pairs, operation)
        else:
            bucket.work = dist.all_reduce(bucket.flat, operation, group=self.group, async_op=True)

    def _finish(self) -> None:
        """Runs when the backward pass ends: parameters without a gradient leave their bucket unreduced until here."""
        self._passes = 0
        for bucket in self._buckets:
            if bucket.work is None:
                self._reduce(bucket)
        for bucket in self._buckets:
            bucket.work.wait()
            bucket.work = None
            bucket.missing = len(bucket.views)
            for part, cut in bucket.cuts:
                part.grad = cut


def _bucket_of(parameters: list[nn.Parameter], parts: ReplicaParts | None, may_leave_early: bool) -> _Bucket:
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float32, device=parameters[0].device)
    views, start = [], 0
    for parameter in parameters:
        views.append((parameter, flat[start : start + parameter.numel()].view(parameter.shape)))
        start += parameter.numel()
    cuts = [] if parts is None else [(parts.of(parameter), parts.cut(parameter, view)) for parameter, view in views]
    return _Bucket(flat, views, cuts, may_leave_early)
