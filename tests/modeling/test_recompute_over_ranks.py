"""Computing again in the backward pass over a tensor group: the same messages carry the same numbers."""

import pytest
import torch

from neox_hf import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_hf.modeling.fresh_weights import draw_weights
from neox_hf.modeling.recompute import recompute_kwargs
from neox_hf.parallel.topology import Topology
from tests.gloo import run_ranks
from tests.modeling.small import SMALL

CASES = [
    {"use_parallel_residual": parallel, "hidden_dropout": dropout, "attention_dropout": dropout}
    for parallel in (True, False)
    for dropout in (0.0, 0.2)
]


def gradients(topology, fields, mode):
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, initializer_range=0.2, **fields), topology)
    draw_weights(model, 1, "cpu")
    model.train()
    arguments = recompute_kwargs(mode)
    if arguments is not None:
        model.activation_checkpointing_enable(arguments)
    torch.manual_seed(5)
    tokens = torch.randint(0, 64, (2, 16))
    for _ in range(2):  # the second backward pass begins where the first left the generators
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def differing(rank, sequence):
    """The cases in which some gradient is not the one without recomputation."""
    topology = Topology.from_world(2, rank, tensor=2, sequence=sequence).connect()
    found = []
    for fields in CASES:
        wanted = gradients(topology, fields, "none")
        for mode in ("selective", "full"):
            same = [torch.equal(a, b) for a, b in zip(gradients(topology, fields, mode), wanted, strict=True)]
            if not all(same):
                found.append((fields, mode))
    return found


@pytest.mark.parametrize("sequence", [False, True])
def test_gradients_are_the_same_to_the_bit(sequence):
    assert run_ranks(differing, 2, sequence) == [[], []]
