"""`NeoXTrainingArguments` as Python and a command line give them."""

import pytest
from transformers import HfArgumentParser

from neox_hf.training.arguments import NeoXTrainingArguments


@pytest.fixture
def make(tmp_path):
    def make(**given):
        return NeoXTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **given)

    return make


def parsed(tmp_path, *words):
    (arguments,) = HfArgumentParser(NeoXTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", *words]
    )
    return arguments


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--cuda_graphs", "false"], "cuda_graphs", False),
        ([], "cuda_graphs", "auto"),
        (["--activation_checkpointing", "true"], "recompute", "full"),
        (["--activation_checkpointing", "selective"], "recompute", "selective"),
        ([], "recompute", "none"),
        (["--save_schedule", "[1, 2]"], "save_schedule", [1, 2]),
        (["--save_schedule", "pythia"], "save_schedule", "pythia"),
        (["--lr_decay_style", "cosine"], "lr_decay_style", "cosine"),
        (["--report_to", "wandb"], "report_to", ["wandb"]),
    ],
)
def test_hf_s_parser_of_command_lines_knows_them(words, name, value, tmp_path):
    assert getattr(parsed(tmp_path, *words), name) == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"save_schedule": "pythya"}, "save_schedule='pythya': wants one of every, none, pythia or a list"),
        ({"save_schedule": (1, 2)}, r"save_schedule=\(1, 2\): wants"),
        ({"nan_policy": "skipp"}, "nan_policy='skipp': wants one of raise, skip"),
        ({"activation_checkpointing": "selektive"}, "wants one of none, full, selective or true or false or null"),
        ({"cuda_graphs": "on please"}, "cuda_graphs='on please': wants auto or true or false"),
        ({"max_skipped_steps": 1.5}, "max_skipped_steps=1.5: wants a whole number"),
    ],
)
def test_values_that_no_field_takes_are_refused(given, message, make):
    with pytest.raises(ValueError, match=message):
        make(**given)


@pytest.mark.parametrize(
    ("given", "precision"),
    [
        ({}, "fp32"),
        ({"bf16": True}, "amp"),
        ({"bf16": True, "precision": "bf16"}, "bf16"),
        ({"bf16": True, "precision": "amp"}, "amp"),
    ],
)
def test_hf_s_flag_is_what_auto_stands_for(given, precision, make):
    arguments = make(**given)
    assert arguments.precision == precision
    assert arguments.bf16 == (precision == "amp")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bf16": True, "precision": "fp32"}, "bf16=True beside precision='fp32'"),
        ({"fp16": True, "precision": "bf16"}, "fp16=True beside precision='bf16'"),
        ({"precision": "fp16"}, "precision='fp16' needs DeepSpeed, .* or choose bf16, amp or fp32"),
        ({"fp16": True}, "precision='fp16' needs DeepSpeed"),
    ],
)
def test_precisions_that_cannot_be_are_refused(given, message, make):
    with pytest.raises(ValueError, match=message):
        make(**given)


def test_a_schedule_saves_alone(make):
    assert make(save_schedule=[3], save_steps=2).save_strategy == "no"
    assert make(save_steps=2).save_strategy == "steps"


@pytest.mark.parametrize(("metric", "greater"), [("perplexity", False), ("eval_perplexity", False), ("loss", False)])
def test_less_is_better(metric, greater, make):
    assert make(metric_for_best_model=metric, load_best_model_at_end=False).greater_is_better in (greater, None)
    assert make(metric_for_best_model=metric, save_strategy="best", eval_strategy="steps").greater_is_better is greater


def test_epochs_that_decide_nothing_are_told_of(make, caplog):
    make(num_train_epochs=1, max_steps=-1)
    assert not caplog.records
    make(num_train_epochs=1)
    assert "num_train_epochs=1 is not used: max_steps=1000 ends the run; give max_steps=-1" in caplog.text
