"""The language-model loss: shifting, ignoring, weighting."""

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from neox_hf.kernels import cross_entropy

VOCABULARY = 29


def batch(rows=3, length=7):
    torch.manual_seed(0)
    labels = torch.randint(0, VOCABULARY, (rows, length))
    labels[0, :4] = -100
    return torch.randn(rows, length, VOCABULARY) * 4, labels


def written_out(logits, labels):
    """Mean of log-sum-exp minus the label's logit, one position at a time."""
    losses = [
        logits[b, s].exp().sum().log() - logits[b, s, labels[b, s + 1]]
        for b in range(labels.shape[0])
        for s in range(labels.shape[1] - 1)
        if labels[b, s + 1] != -100
    ]
    return torch.stack(losses).mean()


def test_follows_the_equation(assert_follows):
    logits, labels = batch()
    assert_follows(lambda z: cross_entropy(z, labels), lambda z: written_out(z, labels), (logits,), 1e-5)


@pytest.mark.parametrize("items", [None, 40, torch.tensor(40)])
@pytest.mark.parametrize("shifted", [False, True])
def test_equals_transformers(items, shifted):
    logits, labels = batch()
    shift_labels = torch.randint(0, VOCABULARY, labels.shape) if shifted else None
    ours = cross_entropy(logits, labels, shift_labels=shift_labels, num_items_in_batch=items)
    theirs = ForCausalLMLoss(logits, labels, vocab_size=VOCABULARY, shift_labels=shift_labels, num_items_in_batch=items)
    assert torch.allclose(ours, theirs, rtol=1e-6)


def test_shift_labels_win_and_need_no_labels():
    logits, labels = batch()
    next_labels = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    wanted = cross_entropy(logits, labels)
    assert torch.equal(cross_entropy(logits, torch.zeros_like(labels), shift_labels=next_labels), wanted)
    assert torch.equal(cross_entropy(logits, None, shift_labels=next_labels), wanted)


def test_weights_by_token_add_up_over_micro_batches():
    logits, labels = batch()
    items = int((labels[:, 1:] != -100).sum())
    parts = [cross_entropy(logits[i : i + 1], labels[i : i + 1], num_items_in_batch=items) for i in range(3)]
    assert torch.allclose(sum(parts), cross_entropy(logits, labels), rtol=1e-6)


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)])
def test_no_label_at_all_gives_zero_and_not_nan(items):
    logits, labels = batch()
    logits.requires_grad_()
    loss = cross_entropy(logits, torch.full_like(labels, -100), num_items_in_batch=items)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_other_ignore_index():
    logits, labels = batch()
    assert torch.equal(
        cross_entropy(logits, labels.masked_fill(labels == -100, 3).where(labels != -100, -1), ignore_index=-1),
        cross_entropy(logits, labels),
    )


def test_bfloat16_logits_keep_fp32_statistics():
    logits, labels = batch(rows=8, length=64)
    low = logits.to(torch.bfloat16)
    loss = cross_entropy(low, labels)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, cross_entropy(low.float(), labels), rtol=1e-7)


def test_without_labels_is_refused():
    with pytest.raises(ValueError, match="needs labels or shift_labels; found neither"):
        cross_entropy(torch.zeros(1, 2, 3), None)
