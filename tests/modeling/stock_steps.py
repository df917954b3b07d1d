"""Whether two models do the same."""

import torch


def assert_near(found, wanted):
    with torch.no_grad():
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1.0)


def assert_same_step(before, after, **batch):
    """Loss, logits where there are any, and the gradient of every parameter that has one."""
    wanted, found = before(**batch), after(**batch)
    assert_near(found.loss, wanted.loss)
    if found.logits is not None:
        assert_near(found.logits, wanted.logits)
    wanted.loss.backward()
    found.loss.backward()
    for (name, ours), (same_name, theirs) in zip(after.named_parameters(), before.named_parameters(), strict=True):
        assert name == same_name
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            assert_near(ours.grad, theirs.grad)
