"""A loss that the caller multiplies: gradients that are made with it are rounded once, if they are told by what."""

import torch


def gradients(model, ids, factor, **told):
    model.zero_grad()
    (model(ids, labels=ids, skip_logits=True, use_cache=False, **told).loss * factor).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_factor_that_is_told_leaves_nothing_to_put_right(make_model, tokens):
    model, ids = make_model().bfloat16(), tokens()
    labels = ids[:, 1:].numel()
    wanted = gradients(model, ids, 1, num_items_in_batch=torch.tensor(labels / 3))
    told = gradients(model, ids, 3, loss_factor=3)
    untold = gradients(model, ids, 3)
    assert all(torch.equal(told[name], wanted[name]) for name in wanted)
    head = "lm_head.weight"
    assert not torch.equal(untold[head], wanted[head])  # rounded twice
    assert torch.allclose(untold[head], wanted[head], rtol=2**-6)


def test_the_loss_itself_is_as_without(make_model, tokens):
    model, ids = make_model(), tokens()
    plain, told = (model(ids, labels=ids, skip_logits=True, **more).loss for more in ({}, {"loss_factor": 4}))
    assert torch.equal(plain, told)
