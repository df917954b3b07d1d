"""z-loss: in the loss of training, on either way to it, and nowhere else."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neox_hf.modeling.causal_lm import regularise_logits

WEIGHT = 0.05


def wanted(model, ids):
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return loss, loss + WEIGHT * logits.logsumexp(-1).square().mean()


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("skip_logits", [False, True])
def test_it_is_the_squared_log_of_the_denominator(make_model, tokens, skip_logits, kernels):
    model, ids = make_model(), tokens()
    model.choose_kernels(kernels)
    regularise_logits(model, WEIGHT)
    model.train()
    _, expected = wanted(model, ids)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = model(ids, labels=ids, skip_logits=skip_logits, use_cache=False).loss
    torch.testing.assert_close(loss, expected)
    for found, gradient in zip(torch.autograd.grad(loss, list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("skip_logits", [False, True])
def test_evaluation_leaves_it_out(make_model, tokens, skip_logits):
    model, ids = make_model().eval(), tokens()
    regularise_logits(model, WEIGHT)
    expected, _ = wanted(model, ids)
    torch.testing.assert_close(model(ids, labels=ids, skip_logits=skip_logits).loss, expected)


def test_a_loss_that_is_not_ours_cannot_hold_it(make_model):
    model = make_model()
    model.loss_function = lambda **_: torch.zeros(())
    with pytest.raises(ValueError, match=r"z_loss=0.05 cannot be added .* its loss_function has been replaced"):
        regularise_logits(model, WEIGHT)
    with pytest.raises(ValueError, match="it is no causal language model of neox_hf"):
        regularise_logits(nn.Linear(2, 2), WEIGHT)
