"""The step of DeepSpeed's BF16_Optimizer, once over memory.

By itself it reads all gradients for their norm, multiplies them by what clipping comes to, steps fp32 masters, casts
these to weights, and zeroes the gradients twice: 54 bytes for each element. Here the norm is one read, and a kernel
does the rest: 38. What it computes is the same.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import all_gather_dp_groups
from torch import Tensor

from neox_hf.kernels import ADAMW, TensorTables, clip_coefficient, gradient_square_sum
from neox_hf.training.fused_adamw import FusedAdamW


def step_at_once(optimizer: object) -> None:
    """Have `optimizer` step so, if it is a BF16_Optimizer around our AdamW, for whose step there is a kernel."""
    if not isinstance(optimizer, BF16_Optimizer) or not isinstance(optimizer.optimizer, FusedAdamW):
        return
    inner, masters = optimizer.optimizer, optimizer.fp32_groups_flat_partition
    fused = all(group["fused"] is not False for group in inner.param_groups)
    in_fp32 = optimizer.grad_acc_dtype == torch.float32 and optimizer.norm_type == 2
    if fused and in_fp32 and not optimizer.has_moe_layers and ADAMW.has_kernel_for(inner.kernels, masters[0]):
        # DeepSpeed makes its optimizer by itself, and takes no class for it.
        at_once = StepAtOnce(optimizer)
        optimizer.step, optimizer.clear_hp_grads = at_once.step, at_once.clear_gradients


class StepAtOnce:
    """`step` and `clear_gradients` in the places of DeepSpeed's `step` and `clear_hp_grads`."""

    def __init__(self, optimizer: BF16_Optimizer) -> None:
        self.optimizer, self.inner = optimizer, optimizer.optimizer
        self._tables = TensorTables()
        parts = zip(optimizer.bf16_partitioned_groups, optimizer.real_dp_process_group, strict=True)
        weights = [partitions[dist.get_rank(group)] for partitions, group in parts]
        self.inner.copies = dict(zip(optimizer.fp32_groups_flat_partition, weights, strict=True))
        # Gradients of other ranks' parts are no part of the step.
        self.inner.zeroes_gradients = all(count == 1 for count in optimizer.partition_count)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Step masters and weights of this rank's part and gather the weights; without either, where the norm is not
        finite."""
        assert closure is None, "DeepSpeed's engine gives none"
        optimizer, inner = self.optimizer, self.inner
        norm = self._norm()
        # Its engine asks the host for this after every step, too.
        optimizer.overflow = not bool(norm.isfinite())
        optimizer._global_grad_norm = float("inf") if optimizer.overflow else norm
        if not optimizer.overflow:
            inner.gradient_factor = clip_coefficient(norm, optimizer.clip_grad) if optimizer.clip_grad > 0 else None
            gradients = optimizer.fp32_groups_gradient_flat_partition
            for master, gradient in zip(optimizer.fp32_groups_flat_partition, gradients, strict=True):
                master.grad = gradient
            inner.step()
            optimizer._lazy_init_hp_params_optimizer_state()
            self._gather_weights()
            if inner.zeroes_gradients:
                self._note_zeros()
        optimizer.clear_hp_grads()

    def clear_gradients(self) -> None:
        """Zero those groups in which a gradient was added since they were zeroed."""
        optimizer = self.optimizer
        for flat, added in zip(optimizer.fp32_groups_gradients_flat, optimizer.fp32_groups_has_gradients, strict=True):
            if any(added):
                flat.zero_()
        self._note_zeros()

    def _note_zeros(self) -> None:
        groups = self.optimizer.fp32_groups_has_gradients
        groups[:] = [[False] * len(added) for added in groups]

    def _norm(self) -> Tensor:
        """Of the gradients of all model-parallel ranks, what several of them hold once."""
        optimizer = self.optimizer
        gradients, _ = optimizer.get_grads_for_norm()
        square = gradient_square_sum(gradients, tables=self._tables, backend=self.inner.kernels)
        square = square.to(optimizer.fp32_groups_flat_partition[0].device)
        if optimizer.mpu is not None:
            dist.all_reduce(square, group=optimizer.mpu.get_model_parallel_group())
        return square.sqrt()

    def _gather_weights(self) -> None:
        optimizer = self.optimizer
        all_gather_dp_groups(
            groups_flat=optimizer.bf16_groups_flat,
            partitioned_param_groups=optimizer.bf16_partitioned_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )
