"""Replicas with bf16 weights average fp32 gradients, and agree with one process that sees all of the data."""

import torch
from torch import nn

from neox_hf.parallel.data_parallel import DataParallel, accumulate_gradients_in_fp32
from tests.gloo import run_ranks


def small_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)).bfloat16()
    model.register_parameter("unused", nn.Parameter(torch.zeros(4)))
    return model


def inputs(rank: int, micro: int) -> torch.Tensor:
    return torch.randn(2, 6, generator=torch.Generator().manual_seed(10 * rank + micro)).bfloat16()


def two_micro_batches(rank: int, bucket_elements: int) -> list[torch.Tensor]:
    replica = DataParallel(small_model(seed=rank), bucket_elements=bucket_elements)
    for _ in range(2):  # the second round starts from cleared buckets
        replica.zero_grad()
        with replica.no_sync():
            replica(inputs(rank, 0)).float().pow(2).sum().backward()
        replica(inputs(rank, 1)).float().pow(2).sum().backward()
    return [parameter.grad for parameter in replica.module.parameters()]


def test_two_ranks_equal_one_process():
    whole = small_model(seed=0)
    accumulate_gradients_in_fp32(whole)
    for rank in range(2):
        for micro in range(2):
            (whole(inputs(rank, micro)).float().pow(2).sum() / 2).backward()
    for bucket_elements in (8, 10**6):
        for gradients in run_ranks(two_micro_batches, 2, bucket_elements):
            for (name, parameter), gradient in zip(whole.named_parameters(), gradients, strict=True):
                wanted = torch.zeros_like(gradient) if parameter.grad is None else parameter.grad
                assert gradient.dtype == torch.float32, name
                torch.testing.assert_close(gradient, wanted, rtol=1e-2, atol=1e-3, msg=name)


def test_replicas_start_from_the_first_ranks_weights():
    for gradients in run_ranks(first_weights, 2):
        assert torch.equal(gradients, next(small_model(seed=0).parameters()).float())


def first_weights(rank: int) -> torch.Tensor:
    return next(DataParallel(small_model(seed=rank)).parameters()).detach().float()
