"""What a recipe's kernels are timed by: all that can be chosen is asked for, with the shapes that a run has."""

from dataclasses import replace

import pytest
import torch

from neox_hf.errors import RecipeError
from neox_hf.kernels.launch_choice import launches_on
from neox_hf.training.recipe import load_recipe
from neox_hf.tuning import Sizes, layer_work, step_work
from neox_hf.tuning.inputs import Random
from tests.tuning.tiny import TINY

CPU = torch.device("cpu")
BASE = "recipes/pythia_1.4b.yaml"
VARIANTS = {
    "as released": TINY,
    "dropout": replace(TINY, dropout=0.1, parallel_residual=False, attention_bias=False, parameters=0),
    "documents": replace(TINY, documents=True),
    "amp": replace(TINY, stream=torch.float32, gradient=torch.float32, master=False),
}
ASKED = {
    "as released": {
        "adamw",
        "gradient_norm",
        "losses_and_gradient",
        "bias_gelu_forward",
        "gelu_forward",
        "bias_gelu_backward",
        "gelu_backward",
        "row_norm_forward",
        "row_norm_backward",
        "bias_dropout_residual_forward",
        "rotary_in_place",
        "rotary_assemble_with_sums",
        "rotary_back_with_sums",
        "column_sums",
    }
}
ASKED["amp"] = ASKED["as released"]
ASKED["documents"] = ASKED["as released"] | {
    "document_attention_forward",
    "document_attention_of_queries",
    "document_attention_of_keys",
}
ASKED["dropout"] = (ASKED["as released"] | {"dropout_backward", "rotary_assemble"}) - {
    "adamw",
    "gradient_norm",
    "rotary_assemble_with_sums",
    "rotary_back_with_sums",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_all_that_can_be_chosen_is_asked_for(name):
    """Each call is what a run launches; it is repeatable, since equal inputs must tell candidates apart."""
    asked = set()
    for work in [*step_work(VARIANTS[name]), *layer_work(VARIANTS[name])]:
        first, again = (work.prepare(Random(CPU)) for _ in range(2))
        results = []
        questions = launches_on(CPU).asked_by(lambda call=first, kept=results: kept.append(call()))
        assert questions, f"{work.name} launches nothing that can be chosen"
        asked |= {question.key.op for question in questions}
        assert all(torch.equal(a, b) for a, b in zip(results[0], again(), strict=True)), work.name
    assert asked == ASKED[name]


def test_another_activation_and_no_rotation_have_no_work():
    names = {work.name for work in layer_work(replace(TINY, form=None, rotary=0))}
    assert names
    assert not any("GELU" in name or "rotary" in name for name in names)
    assert [work.name for work in step_work(replace(TINY, vocabulary=None))] == ["AdamW", "gradient norm"]


def sizes(*overrides, files=(BASE,)):
    return Sizes.of(load_recipe(files, overrides=["train.precision=bf16", *overrides]))


def test_sizes_of_a_recipe():
    found = sizes()
    assert (found.hidden, found.inner, found.heads, found.head_size, found.rotary) == (2048, 8192, 16, 128, 32)
    assert (found.batch, found.sequence, found.tokens) == (16, 2048, 32768)
    assert (found.vocabulary, found.form, found.dropout) == (50304, "erf", 0.0)
    assert (found.stream, found.product, found.gradient) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert found.master
    assert found.parameters == 1_414_647_808


@pytest.mark.parametrize(
    ("settings", "documents"),
    [
        ([], True),
        (["model.attn_implementation=sdpa"], True),
        (["model.attn_implementation=eager"], False),
        (["model.kernels=torch"], False),
        (["data.document_mask=false"], False),
        (["model.attention_dropout=0.1"], False),
    ],
)
def test_who_keeps_documents_apart(settings, documents):
    assert sizes("data.document_mask=true", *settings).documents is documents


def test_sizes_of_other_precisions():
    amp, pure = sizes("train.precision=amp"), sizes("train.precision=pure_bf16")
    assert (amp.stream, amp.product, amp.gradient, amp.master) == (
        torch.float32,
        torch.bfloat16,
        torch.float32,
        False,
    )
    assert (pure.stream, pure.gradient, pure.master) == (torch.bfloat16, torch.bfloat16, False)


def test_sizes_of_a_tensor_rank():
    found = sizes("parallel.tensor=2", "train.per_device_train_batch_size=4")
    assert (found.batch, found.hidden, found.inner, found.heads) == (4, 2048, 4096, 8)
    assert found.vocabulary is None
    assert found.parameters == 707_735_552


@pytest.mark.parametrize(
    ("layout", "stepped"),
    [("zero_stage: 1", 1_414_647_808), ("zero_stage: 1, offload: optimizer", 0), ("zero_stage: 3", 0)],
)
def test_what_our_kernel_steps_under_zero(layout, stepped):
    assert sizes(f"parallel={{{layout}}}").parameters == stepped


@pytest.mark.parametrize("setting", ["train.optim=adamw_torch", "model.kernels=torch"])
def test_what_torch_steps_under_zero(setting):
    assert sizes("parallel.zero_stage=1", setting).parameters == 0


def test_a_recipe_whose_vocabulary_is_not_known(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "model: {num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 2}\n"
        "tokenizer: {kind: pretrained, path: somewhere}\n"
        f"data: {{sources: [{{path: stdlib}}], seq_length: 32}}\ntrain: {{output_dir: {tmp_path}}}\n"
    )
    with pytest.raises(RecipeError, match=r"how many words the pretrained tokenizer has.*set model.vocab_size"):
        sizes(files=[str(recipe)])
