"""Stages, called one after the other, are the model."""

import pytest
import torch

from neox_hf.errors import TopologyError
from neox_hf.kernels.weight_gradient import SumInGrad, sum_in
from neox_hf.modeling.causal_lm import GPTNeoXForCausalLM
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.fresh_weights import draw_weights
from neox_hf.modeling.stage import Stage
from neox_hf.parallel.topology import Topology

BOUNDS = [0, 1, 4]
TOKENS = torch.arange(2 * 16).view(2, 16) % 90
PACKED = torch.tensor([[*range(10), *range(6)], [*range(3), *range(13)]])


def config(**fields) -> GPTNeoXConfig:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 96}
    return GPTNeoXConfig(num_hidden_layers=4, hidden_dropout=0.0, **sizes, **fields)


def drawn(config: GPTNeoXConfig, rank: int | None = None) -> tuple[GPTNeoXForCausalLM, Stage | None]:
    """The model, whole or as stage `rank` of two holds it."""
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(config)
    if rank is None:
        draw_weights(model, 7, "cpu")
        return model, None
    topology = Topology(pipeline=2, rank=rank)
    draw_weights(model, 7, "cpu", Stage.of_rank(model, topology, BOUNDS).local_modules)
    return model, Stage.of_materialised(model, topology)


def run(stages: list[Stage], positions: torch.Tensor | None) -> torch.Tensor:
    """The loss through the stages, whose borders pass gradients on."""
    passed = TOKENS if positions is None else (TOKENS, positions)
    for stage in stages:
        passed = stage(passed)
    weight = torch.tensor(0.5)
    return stages[-1].loss(passed, (next_tokens(), weight, weight))


def next_tokens() -> torch.Tensor:
    labels = TOKENS.roll(-1, dims=1).clone()
    labels[:, ::5] = -100
    return labels


@pytest.mark.parametrize("positions", [None, PACKED])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_are_the_models(tied, positions):
    whole, _ = drawn(config(tie_word_embeddings=tied))
    parts = [drawn(config(tie_word_embeddings=tied), rank) for rank in range(2)]
    run([stage for _, stage in parts], positions).backward()
    labels = next_tokens()
    given = {} if positions is None else {"position_ids": positions}
    # Half of the sum: the mean times half of the labels.
    (whole(TOKENS, shift_labels=labels, **given).loss * (labels != -100).sum() / 2).backward()
    gradients: dict[str, torch.Tensor] = {}
    for model, _ in parts:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = gradients.get(name, 0) + parameter.grad
    assert gradients.keys() == {name for name, _ in whole.named_parameters()}
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_whose_gradients_are_summed_has_its_own_summed_at_once(tied):
    """But a tied one, whose other gradient is autograd's."""
    _, plain = drawn(config(tie_word_embeddings=tied), rank=1)
    _, stage = drawn(config(tie_word_embeddings=tied), rank=1)
    sum_in(stage.lm_head.weight, SumInGrad())
    hidden = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor(0.5)
    for each in (plain, stage):
        passed, there = each(hidden.clone().requires_grad_()), []
        for share in (0.5, 0.25):  # of the weight: micro-batches of a step of two, and of one of four
            loss = each.loss(passed, (next_tokens(), weight, weight * share))
            there.append(each.lm_head.weight.grad is not None)
            loss.backward(torch.tensor(share), retain_graph=True)
        assert there == [each is stage and not tied, True]
    torch.testing.assert_close(stage.lm_head.weight.grad, plain.lm_head.weight.grad, rtol=1e-5, atol=1e-6)


def test_only_its_own_modules_are_in_memory_and_trained():
    model, stage = drawn(config(), rank=1)
    local = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    assert {name.split(".")[2] for name in local if ".layers." in name} == {"1", "2", "3"}
    assert {name for name in local if ".layers." not in name} == {
        "gpt_neox.final_layer_norm.weight",
        "gpt_neox.final_layer_norm.bias",
        "lm_head.weight",
    }
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == local
    assert {id(parameter) for parameter in stage.parameters()} == {
        id(parameter) for parameter in model.parameters() if parameter.requires_grad
    }


def test_who_casts_a_stage_leaves_its_rotary_frequencies():
    model, stage = drawn(config(), rank=0)
    stage.to(torch.bfloat16)
    assert model.gpt_neox.rotary_emb.inv_freq.dtype == torch.float32
    assert model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight.dtype == torch.bfloat16


def test_modes_reach_what_runs_the_layers():
    model, stage = drawn(config(), rank=0)
    stage.eval()
    assert not model.gpt_neox.training
    stage.train()
    assert model.gpt_neox.training


@pytest.mark.parametrize("rank", [0, 1])
def test_a_model_that_is_whole_everywhere_is_told(rank):
    model = GPTNeoXForCausalLM(config())
    with pytest.raises(TopologyError, match=rf"stage {rank} of 2 has layers 0 to 3 of 4 in memory, .*first_model does"):
        Stage.of_materialised(model, Topology(pipeline=2, rank=rank))
