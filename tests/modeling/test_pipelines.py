"""Tokenizers and pipelines find our classes by the names they know."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

import neox_hf


@pytest.fixture
def repository(make_model, tmp_path):
    words = ["<|endoftext|>", "<|padding|>", *(f"word{i}" for i in range(62))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|padding|>"
    ).save_pretrained(tmp_path)

    def save(name, **fields):
        make_model(getattr(neox_hf, name), pad_token_id=1, **fields).save_pretrained(tmp_path)
        return str(tmp_path)

    return save


def test_text_generation(repository):
    directory = repository("GPTNeoXForCausalLM")
    generator = pipeline("text-generation", model=directory, device="cpu")
    assert type(generator.model) is neox_hf.GPTNeoXForCausalLM
    texts = generator(["word5 word6", "word7"], max_new_tokens=4, do_sample=False, batch_size=2)
    alone = generator("word7", max_new_tokens=4, do_sample=False)
    assert len(texts[0][0]["generated_text"]) > len(start := "word5 word6")
    assert texts[0][0]["generated_text"].startswith(start)
    assert texts[1] == alone


def test_text_classification(repository):
    classifier = pipeline("text-classification", model=repository("GPTNeoXForSequenceClassification"), device="cpu")
    assert type(classifier.model) is neox_hf.GPTNeoXForSequenceClassification
    assert classifier("word3 word4")[0]["label"] in ("LABEL_0", "LABEL_1")


def test_token_classification(repository):
    directory = repository("GPTNeoXForTokenClassification")
    tagger = pipeline("token-classification", model=directory, device="cpu", ignore_labels=[])
    assert len(tagger("word3 word4 word5")) == 3


def test_tokenizer_loads_beside_our_configuration(repository):
    tokenizer = AutoTokenizer.from_pretrained(repository("GPTNeoXForCausalLM"))
    assert torch.equal(tokenizer("word0 word1", return_tensors="pt").input_ids, torch.tensor([[2, 3]]))
