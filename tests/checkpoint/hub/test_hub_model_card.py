"""The model card, read back by the Hub's own classes."""

import dataclasses
import math

import pytest
from huggingface_hub import ModelCard

from neox_hf.checkpoint.hub import CardFacts, HubPublisher, model_card

FACTS = CardFacts(
    repo_id="tester/tiny",
    license="apache-2.0",
    parameters=162_322_944,
    tokens=2_097_152,
    steps=1000,
    sources=["hub:EleutherAI/the_pile_deduplicated", "stdlib"],
    architecture={"layers": 12, "hidden size": 768},
    hyperparameters={"learning rate": 6e-4, "betas": "0.9 | 0.95"},
    revisions=["step1", "step1000"],
    eval_loss=2.5,
    loss_curve="loss_curve.png",
    versions={"torch": "2.13.0"},
)


def test_the_metadata_is_read_back_as_meant():
    data = ModelCard(model_card(FACTS)).data
    assert data.library_name == "transformers"
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["gpt_neox", "neox_hf"]
    assert data.datasets == ["EleutherAI/the_pile_deduplicated"]
    assert data.model_name == "tiny"
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == {"loss": 2.5, "perplexity": pytest.approx(math.exp(2.5), abs=1e-6)}
    assert {result.dataset_name for result in data.eval_results} == {"EleutherAI/the_pile_deduplicated, stdlib"}


def test_the_text_tells_how_to_load_and_what_was_measured():
    text = model_card(FACTS)
    assert "162,322,944 parameters, trained on 2,097,152 tokens in 1,000 steps" in text
    assert 'AutoModelForCausalLM.from_pretrained("tester/tiny")' in text
    assert 'from_pretrained("tester/tiny", revision="step1000")' in text
    assert "| perplexity | 12.1825 |" in text
    assert "![training and evaluation loss](loss_curve.png)" in text
    assert "- `stdlib`" in text
    assert r"| betas | 0.9 \| 0.95 |" in text
    assert "| layers | 12 |" in text
    assert "| torch | 2.13.0 |" in text
    assert "import neox_hf" not in text


def test_an_extended_model_says_what_it_needs():
    assert "import neox_hf  # registers" in model_card(dataclasses.replace(FACTS, model_type="neox_hf"))


def test_little_known_facts_leave_no_empty_sections():
    facts = CardFacts(repo_id="a/b", license="mit", parameters=1, tokens=2, steps=3, sources=[])
    text = model_card(facts)
    data = ModelCard(text).data
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## How to load"]
    assert data.eval_results is None
    assert data.datasets is None


@pytest.mark.parametrize("loss", [math.nan, math.inf, 800.0])
def test_a_loss_without_a_perplexity_stays_out_of_the_metadata(loss):
    text = model_card(dataclasses.replace(FACTS, eval_loss=loss))
    assert ModelCard(text).data.eval_results is None
    assert f"| loss (nats per token) | {loss:.4f} |" in text
    assert "perplexity" not in text


def test_the_card_is_accepted_with_the_model(hub, settings, checkpoint, tmp_path):
    publisher = HubPublisher(settings, tmp_path)
    publisher.publish_final(checkpoint(1), {"README.md": model_card(FACTS)})
    assert publisher.close(60).pushed == ["main"]
    assert "POST /api/validate-yaml" in hub.requests
    assert ModelCard(hub.files("tester/tiny")["README.md"].decode()).data.license == "apache-2.0"
