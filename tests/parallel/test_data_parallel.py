"""Replicas with bf16 weights average fp32 gradients, and agree with one process that sees all of the data."""

from functools import partial

import torch
from torch import nn

from neox_hf import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_hf.modeling import layer_graphs
from neox_hf.modeling.layer_graphs import LayerGraphs
from neox_hf.parallel.data_parallel import DataParallel, accumulate_gradients_in_fp32
from tests.gloo import run_ranks
from tests.modeling.replayed_passes import ComputedPass
from tests.modeling.small import SMALL


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


def gradients_of_steps(rank: int, replayed: bool) -> list[torch.Tensor]:
    """Of each of some steps of two micro-batches; the layers run as they are, or as captured passes would."""
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, attn_implementation="sdpa")).bfloat16().train()
    replica = DataParallel(model, bucket_elements=5000)
    if replayed:
        layers = model.gpt_neox.layers
        model.gpt_neox.graphs = LayerGraphs(layers)
        layer_graphs._CapturedPass = partial(ComputedPass, layers)
    found = []
    for step in range(3):
        replica.zero_grad()
        ids = torch.randint(0, 64, (2, 2, 16), generator=torch.Generator().manual_seed(10 * rank + step))
        with replica.no_sync():
            replica(ids[0], labels=ids[0], use_cache=False).loss.backward()
        replica(ids[1], labels=ids[1], use_cache=False).loss.backward()
        found += [parameter.grad.clone() for parameter in model.parameters()]
    if replayed:
        assert sum(len(idle) for idle in model.gpt_neox.graphs._idle.values()) == 1
    return found


def test_passes_that_are_captured_exchange_their_gradients_too():
    plain, replayed = (run_ranks(gradients_of_steps, 2, replayed) for replayed in (False, True))
    for index, (wanted, found) in enumerate(zip(plain[0], replayed[0], strict=True)):
        assert torch.equal(wanted, found), index
    assert all(torch.equal(a, b) for a, b in zip(*replayed, strict=True))
