"""Dropout in a tensor group: masks agree where activations are replicated, differ where they are split, and repeat."""

from typing import Any

import pytest
import torch

from neox_hf.modeling.recompute import recompute_kwargs
from tests.gloo import run_ranks
from tests.modeling.tensor_ranks import Layout, Pass, batch, joined, train_pass

DROPOUT = {"hidden_dropout": 0.3, "attention_dropout": 0.3}
BOTH = (False, True)
"""Without and with sequence parallelism."""


def seeded_pass(model, checkpointing: dict[str, Any] | None = None) -> Pass:
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    torch.manual_seed(7)
    return train_pass(model, batch())


def repeated_passes(rank: int) -> list[list[Pass]]:
    """Each layout: a step, again after the generators were set back, and again with each kind of checkpointing."""
    checkpointing = [None, None, recompute_kwargs("full"), recompute_kwargs("selective"), {"use_reentrant": True}]
    layouts = [Layout(2, sequence, DROPOUT) for sequence in BOTH]
    return [[seeded_pass(layout.of_rank(rank), kwargs) for kwargs in checkpointing] for layout in layouts]


def test_masks_repeat():
    whole = seeded_pass(Layout(1, fields=DROPOUT).whole())
    by_layout = zip(*run_ranks(repeated_passes, 2), strict=True)
    for sequence, ranks in zip(BOTH, by_layout, strict=True):
        first = [passes[0] for passes in ranks]
        assert first[0].loss == first[1].loss
        assert first[0].loss != whole.loss, "masks of the split attention are not those of one process"
        if not sequence:
            assert all(torch.equal(*pair) for pair in zip(*(one.residuals for one in first), strict=True))
        for again in zip(*(passes[1:] for passes in ranks), strict=True):
            assert again[0].loss == first[0].loss
            for name in whole.gradients:  # `joined` asserts that replicated ones agree
                assert torch.equal(joined(list(again), name), joined(first, name)), name


def hidden_dropout_pass(rank: int) -> Pass:
    return seeded_pass(Layout(2, fields={"hidden_dropout": 0.3}).of_rank(rank))


def test_hidden_dropout_is_that_of_one_process():
    """Its masks come from the common generator: row-parallel biases are dropped with them, once."""
    wanted = seeded_pass(Layout(1, fields={"hidden_dropout": 0.3}).whole())
    ranks = run_ranks(hidden_dropout_pass, 2)
    torch.testing.assert_close(ranks[0].loss, wanted.loss, rtol=1e-5, atol=0)
    for name, gradient in wanted.gradients.items():
        torch.testing.assert_close(joined(ranks, name), gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


def dropped(rank: int) -> dict[str, torch.Tensor]:
    """What was kept: of attention weights, and of the embedding under sequence parallelism."""
    torch.manual_seed(7)
    model = Layout(2, fields=DROPOUT).of_rank(rank).train()
    model.set_attn_implementation("eager")
    weights = model(batch()["input_ids"], output_attentions=True, use_cache=False).attentions
    scattered = Layout(2, True, DROPOUT).of_rank(rank).train().gpt_neox
    hidden = scattered.embed(torch.full((2, 16), 3))
    return {"attention 0": weights[0] != 0, "attention 1": weights[1] != 0, "embedding": hidden != 0}


def test_split_activations_have_masks_of_their_own():
    first, second = run_ranks(dropped, 2)
    causal = torch.ones(16, 16).tril()
    for name, kept in first.items():
        assert kept.shape == second[name].shape
        assert not torch.equal(kept, second[name]), name
        share = kept.sum() / (causal.sum() * kept[..., 0, 0].numel() if "attention" in name else kept.numel())
        assert share == pytest.approx(0.7, abs=0.06)
    assert not torch.equal(first["attention 0"], first["attention 1"])
