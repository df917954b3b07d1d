"""The step of DeepSpeed's BF16_Optimizer, once over memory.

By itself it sums all gradients on every replica, reads all for their norm, multiplies them by what clipping comes to,
steps fp32 masters, casts these to weights, and zeroes the gradients twice: on one replica 54 bytes for each element.
Here a replica is sent the sums of the part that it steps, the norm is one read of that, and a kernel does the rest: 36
bytes, and half of what went over the wire. Masters are kept as what the weights are short of them. What it computes is
the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.constants import PIPE_REPLICATED
from deepspeed.runtime.utils import all_gather_dp_groups, is_model_parallel_parameter
from deepspeed.utils import fragment_address
from deepspeed.utils.bwc import bwc_tensor_model_parallel_rank
from torch import Tensor, nn

from neox_hf.kernels import ADAMW, TensorTables, clip_coefficient, gradient_square_sum
from neox_hf.parallel.messages import reduce_scatter
from neox_hf.training.fused_adamw import FusedAdamW
from neox_hf.training.halved_master import HalvedMaster

P = ParamSpec("P")
R = TypeVar("R")

IN_HALVES = (
    "fp32 masters are kept as what the weights are short of them; DeepSpeed's functions and checkpoints read and write "
    "them in `with trainer.engine.whole_masters():`, entered on all ranks"
)


def step_at_once(optimizer: object) -> None:
    """Have `optimizer` step so, if it is a BF16_Optimizer around our AdamW, for whose step there is a kernel, and does
    not yet."""
    if not isinstance(optimizer, BF16_Optimizer) or not isinstance(optimizer.optimizer, FusedAdamW):
        return
    if at_once_of(optimizer) is not None:
        return
    inner, masters = optimizer.optimizer, optimizer.fp32_groups_flat_partition
    fused = all(group["fused"] is not False for group in inner.param_groups)
    in_fp32 = optimizer.grad_acc_dtype == torch.float32 and optimizer.norm_type == 2
    if fused and in_fp32 and not optimizer.has_moe_layers and ADAMW.has_kernel_for(inner.kernels, masters[0]):
        # DeepSpeed makes its optimizer by itself, and takes no class for it.
        at_once = StepAtOnce(optimizer)
        optimizer.get_grads_for_reduction = at_once.sum_gradients
        optimizer.step, optimizer.clear_hp_grads = at_once.step, at_once.clear_gradients
        # Its checkpoints would be written, and hold no masters.
        optimizer.state_dict = at_once.needs_whole_masters(optimizer.state_dict)
        optimizer.load_state_dict = at_once.needs_whole_masters(optimizer.load_state_dict)
        optimizer.refresh_fp32_params = at_once.needs_whole_masters(optimizer.refresh_fp32_params)


def at_once_of(optimizer: object) -> "StepAtOnce | None":
    """What steps `optimizer` so, if something does."""
    steps = getattr(getattr(optimizer, "step", None), "__self__", None)
    return steps if isinstance(steps, StepAtOnce) else None


@dataclass(frozen=True)
class Part:
    """What this rank steps of one group of parameters: as many elements of each.

    halves: master and weights. gradients: of the whole group, one after the other; `mine` is a view into them.
    counted: views into `mine` of what the norm takes from this rank.
    """

    halves: HalvedMaster
    gradients: Tensor
    mine: Tensor
    counted: list[Tensor]


class _Halved:
    """In the place of a parameter's view of its master: what it showed has no memory."""

    @property
    def data(self) -> Tensor:
        raise RuntimeError(IN_HALVES)


class StepAtOnce:
    """`sum_gradients`, `step` and `clear_gradients`, in the places of three methods of `optimizer`."""

    def __init__(self, optimizer: BF16_Optimizer) -> None:
        self.optimizer, self.inner = optimizer, optimizer.optimizer
        self.replicas: dist.ProcessGroup = optimizer.dp_process_group
        self.count = dist.get_world_size(self.replicas)
        self.parts = [self._part(group) for group in range(len(self.inner.param_groups))]
        self._tables = TensorTables()
        self.inner.zeroes_gradients = self.count == 1  # other replicas' parts are no part of the step
        self._readers = 0
        self._halve_masters()

    @contextmanager
    def whole_masters(self) -> Iterator[None]:
        """In this context, which all ranks enter, DeepSpeed's fp32 tensors are in memory, to be read and written; at
        its end the weights are what they round to. There is no step inside."""
        self._make_whole()
        self._readers += 1
        try:
            yield
        except BaseException:  # alone, perhaps: no message to other ranks
            self._let_go()
            raise
        self._let_go()
        if self._readers == 0:
            self._gather_weights()

    def needs_whole_masters(self, method: Callable[P, R]) -> Callable[P, R]:
        """`method`, which reads or writes masters, refused outside of `whole_masters()`."""

        @wraps(method)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            if not self._readers:
                raise RuntimeError(IN_HALVES)
            return method(*args, **kwargs)

        return guarded

    def _make_whole(self) -> None:
        self.inner.halves = None
        for part in self.parts:
            part.halves.make_whole()
        self._link_masters(lambda master, address: master.narrow(0, address.start, address.numel))

    def _let_go(self) -> None:
        self._readers -= 1
        if self._readers == 0:
            self._halve_masters()

    def _halve_masters(self) -> None:
        for part in self.parts:
            part.halves.halve()
        self._link_masters(lambda master, address: _Halved())
        self.inner.halves = {part.halves.master: (part.halves.weights, part.halves.remainder) for part in self.parts}

    def _link_masters(self, fragment: Callable[[Tensor, fragment_address], object]) -> None:
        """Have every parameter's view of its part of a master be what `fragment` makes."""
        for part, parameters in zip(self.parts, self.optimizer.bf16_groups, strict=True):
            for mapping in [p._hp_mapping for p in parameters if p._hp_mapping is not None]:
                mapping.hp_fragment = fragment(part.halves.master.detach(), mapping.hp_fragment_address)

    def _part(self, group: int) -> Part:
        optimizer, rank = self.optimizer, dist.get_rank(self.replicas)
        mine, at, counted = optimizer.fp32_groups_gradient_flat_partition[group], 0, []
        begin, end = rank * mine.numel(), (rank + 1) * mine.numel()
        for parameter in optimizer.bf16_groups[group]:
            first, last = max(at, begin), min(at + parameter.numel(), end)
            if first < last and self._counts(parameter):
                counted.append(mine.narrow(0, first - begin, last - first))
            at += parameter.numel()
        master, weights = optimizer.fp32_groups_flat_partition[group], optimizer.bf16_partitioned_groups[group][rank]
        return Part(HalvedMaster(master, weights), optimizer.fp32_groups_gradients_flat[group], mine, counted)

    def _counts(self, parameter: nn.Parameter) -> bool:
        """Whether the norm takes it from this rank: of several that hold the same one does."""
        if getattr(parameter, PIPE_REPLICATED, False):
            return False
        return bwc_tensor_model_parallel_rank(self.optimizer.mpu) == 0 or is_model_parallel_parameter(parameter)

    def sum_gradients(self) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """Over the replicas, each its part. Returns what is left for DeepSpeed's engine to sum: nothing."""
        if self.count > 1:
            for part in self.parts:
                reduce_scatter(part.mine, part.gradients, group=self.replicas)
            self._note_gradients(True)
        return [], {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Step masters and weights of this rank's part and gather the weights; without either, where the norm is not
        finite."""
        assert closure is None, "DeepSpeed's engine gives none"
        if self._readers:
            raise RuntimeError("an optimizer's step inside `whole_masters()`; leave that context first")
        optimizer, inner = self.optimizer, self.inner
        norm = self._norm()
        # Its engine asks the host for this after every step, too.
        optimizer.overflow = not bool(norm.isfinite())
        optimizer._global_grad_norm = float("inf") if optimizer.overflow else norm
        if not optimizer.overflow:
            clip = clip_coefficient(norm, optimizer.clip_grad) if optimizer.clip_grad > 0 else torch.ones_like(norm)
            inner.gradient_factor = clip / self.count  # gradients are sums over replicas, and count as means
            for part in self.parts:
                part.halves.master.grad = part.mine
            inner.step()
            optimizer._lazy_init_hp_params_optimizer_state()
            self._gather_weights()
            if inner.zeroes_gradients:
                self._note_gradients(False)
        optimizer.clear_hp_grads()

    def clear_gradients(self) -> None:
        """Zero those groups in which a gradient was added since they were zeroed."""
        for part, added in zip(self.parts, self.optimizer.fp32_groups_has_gradients, strict=True):
            if any(added):
                part.gradients.zero_()
        self._note_gradients(False)

    def _note_gradients(self, added: bool) -> None:
        groups = self.optimizer.fp32_groups_has_gradients
        groups[:] = [[added] * len(group) for group in groups]

    def _norm(self) -> Tensor:
        """Of the mean gradients of all model-parallel ranks."""
        mpu, device = self.optimizer.mpu, self.parts[0].mine.device
        counted = [gradient for part in self.parts for gradient in part.counted]
        square = gradient_square_sum(counted, tables=self._tables, backend=self.inner.kernels).to(device)
        if self.count > 1:
            dist.all_reduce(square, group=self.replicas)
        if mpu is not None:
            dist.all_reduce(square, group=mpu.get_model_parallel_group())
        return square.sqrt() / self.count

    @torch.no_grad()
    def _gather_weights(self) -> None:
        optimizer = self.optimizer
        all_gather_dp_groups(
            groups_flat=optimizer.bf16_groups_flat,
            partitioned_param_groups=optimizer.bf16_partitioned_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )
