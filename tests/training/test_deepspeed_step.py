"""DeepSpeed's BF16_Optimizer stepped once over memory is what it is by itself."""

import os
from contextlib import nullcontext
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from neox_hf.training.deepspeed_step import at_once_of, step_at_once
from neox_hf.training.fused_adamw import FusedAdamW
from tests.gloo import run_ranks

CLIP = 0.5
STEPS = (0.1, 30.0, float("inf"), 1.0, float("nan"), 3.0)
"""What the gradients of each step are multiplied by: clipped and not, and two steps that are left out."""


def engine_of(kernels: str, fused: bool = True, clip: float = CLIP, device: str = "cpu"):
    """DeepSpeed's, over a small model in bf16 with two groups, one of a length that has to be padded."""
    os.environ["DS_ACCELERATOR"] = device
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 7)).to(device, torch.bfloat16)
    matrices, biases = ([p for p in model.parameters() if (p.ndim == 2) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    inner = FusedAdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=fused, kernels=kernels)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 10**9,
    }
    engine = deepspeed.initialize(model=model, optimizer=inner, config=config)[0]
    # Ranks that split a model add their squares; those of this test hold all of it, and add them all the same.
    engine.optimizer.mpu = SimpleNamespace(
        get_model_parallel_group=lambda: dist.group.WORLD,
        get_tensor_model_parallel_rank=lambda: 0,
        get_pipeline_model_parallel_world_size=lambda: 1,
    )
    return engine


def add_gradients(optimizer, scale: float, generator: torch.Generator) -> None:
    for group, gradients in enumerate(optimizer.fp32_groups_gradients):
        for index, gradient in enumerate(gradients):
            gradient.add_(torch.randn(gradient.shape, generator=generator).to(gradient.device) * scale)
            optimizer.fp32_groups_has_gradients[group][index] = True


def trained(at_once: bool, clip: float, device: str) -> list[list[torch.Tensor]]:
    engine = engine_of("triton" if at_once else "torch", clip=clip, device=device)
    optimizer = engine.optimizer
    stock = optimizer.step
    step_at_once(optimizer)
    found = at_once_of(optimizer)
    assert (optimizer.step != stock) is at_once is (found is not None)
    generator, seen = torch.Generator().manual_seed(1 + dist.get_rank()), []
    for scale in STEPS:
        add_gradients(optimizer, scale, generator)
        engine.buffered_allreduce_fallback()
        optimizer.step()
        assert optimizer.overflow is not torch.tensor(scale).isfinite().item()
        assert not any(flat.any() for flat in optimizer.fp32_groups_gradients_flat)
        assert not any(map(any, optimizer.fp32_groups_has_gradients))
        optimizer.zero_grad()
        with found.whole_masters() if at_once else nullcontext():
            seen.append(what_is_kept(optimizer))
    return seen


def what_is_kept(optimizer) -> list[torch.Tensor]:
    """The last norm, masters and moments; weights are the masters rounded, and alike everywhere."""
    masters = optimizer.fp32_groups_flat_partition
    states = [optimizer.optimizer.state[master] for master in masters]
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq", "step")]
    norm = torch.as_tensor(optimizer._global_grad_norm)
    for master, parts, whole in zip(
        masters, optimizer.bf16_partitioned_groups, optimizer.bf16_groups_flat, strict=True
    ):
        mine = parts[dist.get_rank()]
        assert torch.equal(mine, master.bfloat16())
        everyone = [torch.empty_like(part) for part in parts]
        dist.all_gather(everyone, mine.clone())
        assert torch.equal(torch.cat(everyone), whole)
    return [x.detach().clone() for x in (norm, *masters, *moments)]


def both_ways(rank: int, clip: float, device: str = "cpu") -> None:
    for once, apart in zip(trained(True, clip, device), trained(False, clip, device), strict=True):
        torch.testing.assert_close(once, apart, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("clip", [CLIP, 0.0])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_at_once_is_the_step(world_size, clip):
    run_ranks(both_ways, world_size, clip)


@pytest.mark.gpu
def test_on_a_gpu_too():
    run_ranks(both_ways, 1, CLIP, "cuda", context=get_context("spawn"))


def halved(rank: int) -> None:
    """Between steps masters take no memory, and DeepSpeed's own functions say so or, where they are whole, work."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    optimizer = engine_of("triton").optimizer
    step_at_once(optimizer)
    at_once = at_once_of(optimizer)
    step_at_once(optimizer)
    assert at_once_of(optimizer) is at_once
    assert at_once_of(engine_of("triton").optimizer) is None
    (parameter, _), _ = optimizer.bf16_groups
    for step in range(2):
        add_gradients(optimizer, 1.0, torch.Generator().manual_seed(step))
        optimizer.get_grads_for_reduction()
        optimizer.step()
        assert all(m.untyped_storage().nbytes() == 0 for m in optimizer.fp32_groups_flat_partition)
        with at_once.whole_masters():
            with at_once.whole_masters():
                pass
            master = safe_get_full_fp32_param(parameter)
            assert torch.equal(master.bfloat16(), parameter)
            safe_set_full_fp32_param(parameter, master * 0.75)
        assert torch.equal(parameter, (master * 0.75).bfloat16())
        with at_once.whole_masters():
            assert torch.equal(safe_get_full_fp32_param(parameter), master * 0.75)


def refused(rank: int) -> None:
    from deepspeed.utils import safe_get_full_fp32_param

    optimizer = engine_of("triton").optimizer
    step_at_once(optimizer)
    with pytest.raises(RuntimeError, match=r"trainer\.engine\.whole_masters"):
        safe_get_full_fp32_param(optimizer.bf16_groups[0][0])
    for method in (optimizer.state_dict, optimizer.load_state_dict, optimizer.refresh_fp32_params):
        with pytest.raises(RuntimeError, match=r"trainer\.engine\.whole_masters"):
            method()
    with pytest.raises(RuntimeError, match="step inside"), at_once_of(optimizer).whole_masters():
        optimizer.step()

    def fail() -> None:
        optimizer.fp32_groups_flat_partition[0].data.mul_(2)
        raise ValueError("the caller's")

    with pytest.raises(ValueError, match="the caller's"), at_once_of(optimizer).whole_masters():
        fail()
    assert all(m.untyped_storage().nbytes() == 0 for m in optimizer.fp32_groups_flat_partition)
    add_gradients(optimizer, 1.0, torch.Generator().manual_seed(0))
    optimizer.step()


def own_checkpoint(rank: int, folder: str) -> None:
    """DeepSpeed's, written and read with whole masters: a run that reads it goes on as the one that wrote it."""
    went_on = []
    for reads in (False, True):
        engine = engine_of("triton")
        optimizer = engine.optimizer
        step_at_once(optimizer)
        at_once = at_once_of(optimizer)
        if reads:
            with at_once.whole_masters():
                engine.load_checkpoint(folder, "first")
        for step in range(reads, 2):
            add_gradients(optimizer, 1.0, torch.Generator().manual_seed(10 * step + rank))
            optimizer.get_grads_for_reduction()
            optimizer.step()
            if step == 0:
                with at_once.whole_masters():
                    engine.save_checkpoint(folder, "first")
        with at_once.whole_masters():
            went_on.append([m.clone() for m in optimizer.fp32_groups_flat_partition])
    assert all(torch.equal(a, b) for a, b in zip(*went_on, strict=True))


@pytest.mark.parametrize("world_size", [1, 2])
def test_deepspeeds_own_checkpoint(world_size, tmp_path):
    run_ranks(own_checkpoint, world_size, str(tmp_path))


@pytest.mark.parametrize("world_size", [1, 2])
def test_masters_are_kept_in_halves(world_size):
    run_ranks(halved, world_size)


def test_what_needs_whole_masters_says_so():
    run_ranks(refused, 1)


def counted_once(rank: int) -> None:
    """Of tensor ranks the first counts what all have, and of stages one what several have."""
    for tensor_rank, expected in ((0, 4 + 3 + 2), (1, 4)):
        engine = engine_of("triton")
        optimizer = engine.optimizer
        optimizer.mpu.get_tensor_model_parallel_rank = lambda tensor_rank=tensor_rank: tensor_rank
        (first, _), (_, fourth) = optimizer.bf16_groups
        first.tensor_model_parallel = fourth.ds_pipe_replicated = True
        norms = []
        for _ in range(2):
            gradients = [gradient for group in optimizer.fp32_groups_gradients for gradient in group]
            for gradient, square in zip(gradients, (4, 3, 2, 1), strict=True):
                gradient[0] = square**0.5
            optimizer.fp32_groups_has_gradients[:] = [[True] * 2] * 2
            optimizer.step()
            norms.append(float(optimizer._global_grad_norm))
            step_at_once(optimizer)
        assert norms == pytest.approx([expected**0.5] * 2)


def test_the_norm_counts_once_what_several_ranks_have():
    run_ranks(counted_once, 1)


def left_alone(rank: int) -> None:
    for kernels, fused in (("auto", True), ("torch", True), ("triton", False)):
        optimizer = engine_of(kernels, fused).optimizer
        stock = optimizer.step
        step_at_once(optimizer)
        assert optimizer.step == stock, (kernels, fused)
        assert optimizer.optimizer.halves is None


def test_without_a_kernel_deepspeed_steps():
    run_ranks(left_alone, 1)


def test_other_optimizers_are_left_alone():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(3))])
    stock = optimizer.step
    step_at_once(optimizer)
    assert optimizer.step == stock


def without_additions(rank: int) -> None:
    optimizer = engine_of("triton").optimizer
    step_at_once(optimizer)
    add_gradients(optimizer, 1.0, torch.Generator().manual_seed(1))
    first = optimizer.fp32_groups_gradients_flat[0]
    optimizer.fp32_groups_has_gradients[0] = [False] * len(optimizer.fp32_groups_has_gradients[0])
    optimizer.clear_hp_grads()
    assert first.any(), "a group to which nothing was added is known to be zero, and not written again"
    assert not optimizer.fp32_groups_gradients_flat[1].any()


def test_zeros_are_not_zeroed_again():
    run_ranks(without_additions, 1)
