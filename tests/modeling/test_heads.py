"""Classification and question answering, beside transformers' own classes."""

import pytest
import torch
from transformers import GPTNeoXConfig as StockConfig
from transformers.models.gpt_neox import modeling_gpt_neox as stock

import neox_hf

PAD = 0


@pytest.fixture
def make_heads(make_config):
    def make(name, **fields):
        config = make_config(initializer_range=0.2, **fields)
        torch.manual_seed(0)
        theirs = getattr(stock, name)(StockConfig(**{k: v for k, v in config.to_dict().items() if k != "kernels"}))
        ours = getattr(neox_hf, name)(config)
        ours.load_state_dict(theirs.state_dict())
        return theirs.eval(), ours.eval()

    return make


def assert_equal(theirs, ours, **batch):
    wanted, found = theirs(**batch), ours(**batch)
    assert wanted.keys() == found.keys()
    for key in ("loss", "logits", "start_logits", "end_logits"):
        if wanted.get(key) is not None:
            assert torch.allclose(found[key], wanted[key], atol=1e-5), key
    return found


@pytest.mark.parametrize(
    ("labels", "classes"), [(torch.tensor([1, 2]), 3), (torch.tensor([0.5, 2.0]), 1), (torch.eye(3)[:2], 3)]
)
def test_sequence_classification(labels, classes, make_heads, tokens):
    theirs, ours = make_heads("GPTNeoXForSequenceClassification", num_labels=classes, pad_token_id=PAD)
    ids = tokens()
    ids[0, 11:] = PAD  # right padding
    ids[1, :4] = PAD  # left padding
    found = assert_equal(theirs, ours, input_ids=ids, attention_mask=(ids != PAD).long(), labels=labels)
    assert found.logits.shape == (2, classes)
    assert torch.allclose(found.logits[0], ours(ids[:1, :11]).logits[0], atol=1e-5)


def test_sequence_classification_without_a_padding_token(make_heads, tokens):
    theirs, ours = make_heads("GPTNeoXForSequenceClassification", num_labels=3)
    assert_equal(theirs, ours, input_ids=tokens(rows=1))
    with pytest.raises(ValueError, match=r"a batch of 2 sequences needs config\.pad_token_id"):
        ours(tokens())


def test_sequence_classification_of_embeddings(make_heads, tokens, caplog):
    theirs, ours = make_heads("GPTNeoXForSequenceClassification", num_labels=3, pad_token_id=PAD)
    assert_equal(theirs, ours, inputs_embeds=ours.get_input_embeddings()(tokens()))
    assert "inputs_embeds show no padding" in caplog.text


def test_token_classification(make_heads, tokens):
    theirs, ours = make_heads("GPTNeoXForTokenClassification", num_labels=5)
    labels = tokens() % 5
    labels[0, :3] = -100
    assert assert_equal(theirs, ours, input_ids=tokens(), labels=labels).logits.shape == (2, 16, 5)


def test_question_answering(make_heads, tokens):
    theirs, ours = make_heads("GPTNeoXForQuestionAnswering")
    where = {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([3, 9])}
    assert assert_equal(theirs, ours, input_ids=tokens(), **where).start_logits.shape == (2, 16)
    assert ours(tokens()).loss is None


@pytest.mark.parametrize(
    "name",
    ["GPTNeoXForSequenceClassification", "GPTNeoXForTokenClassification", "GPTNeoXForQuestionAnswering"],
)
def test_return_dict_false(name, make_heads, tokens):
    theirs, ours = make_heads(name)
    wanted, found = (model(tokens(rows=1), return_dict=False, use_cache=False) for model in (theirs, ours))
    assert len(found) == len(wanted)
    assert torch.allclose(found[0], wanted[0], atol=1e-5)
