"""Replicas with bf16 weights average fp32 gradients, and agree with one process that sees all of the data."""

from functools import partial

import pytest
import torch
from torch import nn

from neox_hf import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_hf.modeling import layer_graphs
from neox_hf.modeling.layer_graphs import LayerGraphs
from neox_hf.parallel import Linear
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


class OneLayer(nn.Module):
    """Runs one layer twice, by one name or by two."""

    def __init__(self, names: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = Linear(6, 6)
        self.other = Linear(6, 6)
        if names == 2:
            self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        again = getattr(self, "second", self.first)
        return again(self.other(self.first(x).tanh()).tanh()).float().square().sum()


def model_of(seed: int) -> GPTNeoXForCausalLM:
    torch.manual_seed(seed)
    config = GPTNeoXConfig(**SMALL | {"num_hidden_layers": 1}, attn_implementation="sdpa", kernels="triton")
    return GPTNeoXForCausalLM(config).bfloat16().train()


def tied_by_hand(seed: int) -> GPTNeoXForCausalLM:
    model = model_of(seed)
    model.lm_head.weight = model.gpt_neox.embed_in.weight
    return model


def words(rank: int, micro: int) -> torch.Tensor:
    return torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(10 * rank + micro))


def two_passes(model: nn.Module, rank: int) -> torch.Tensor:
    """One loss of two forward passes, as where answers are compared."""
    passes = [model(words(rank, micro), labels=words(rank, micro), use_cache=False) for micro in range(2)]
    return sum(one.loss for one in passes)


def one_pass(model: nn.Module, rank: int) -> torch.Tensor:
    return model(words(rank, 0), labels=words(rank, 0), use_cache=False).loss


USED_AGAIN = {
    "two passes": (model_of, two_passes),
    "tied by hand": (tied_by_hand, one_pass),
    "two names": (lambda seed: OneLayer(2, seed).bfloat16(), lambda model, rank: model(inputs(rank, 0))),
}


def gradients_used_again(rank: int, kind: str, replicas: bool) -> list[torch.Tensor]:
    """As a replica; or alone, divided by the number of replicas."""
    make, loss = USED_AGAIN[kind]
    model = make(seed=0)
    if replicas:
        replica = DataParallel(model, bucket_elements=100)
        for _ in range(2):
            replica.zero_grad()
            loss(replica, rank).backward()
    else:
        accumulate_gradients_in_fp32(model)
        for each in range(2):
            (loss(model, each) / 2).backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("kind", USED_AGAIN)
def test_parameters_that_are_used_again_travel_when_all_has_come(kind):
    wanted = gradients_used_again(0, kind, False)
    found = run_ranks(gradients_used_again, 2, kind, True)
    for gradients in found:
        for gradient, exact in zip(gradients, wanted, strict=True):
            assert (gradient - exact).norm() <= 1e-2 * exact.norm() + 1e-5


def layer_that_runs_twice(rank: int) -> str:
    replica = DataParallel(OneLayer(1).bfloat16(), bucket_elements=10)
    with pytest.raises(ValueError, match="came after its bucket had left") as found:
        replica(inputs(rank, 0)).backward()
    return str(found.value)


def test_a_gradient_that_comes_too_late_is_told():
    for message in run_ranks(layer_that_runs_twice, 2):
        assert "within no_sync()" in message
