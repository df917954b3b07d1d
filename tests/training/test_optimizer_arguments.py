"""`train.optim_args`: what nobody takes is refused, and the table says what transformers reads."""

import inspect
import re

import pytest
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.training_args import OptimizerNames

from neox_hf.errors import RecipeError
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.optimizer_arguments import arguments_problem, taken_by
from neox_hf.training.trainer import NeoXTrainer


@pytest.mark.parametrize(
    ("optimizer", "given", "message"),
    [
        ("adamw_torch_fused", "amsgrad=true", r"has amsgrad, and optim=adamw_torch_fused takes none"),
        ("adamw_torch", "foo=1", r"has foo, and optim=adamw_torch takes none: its numbers are fields of train; remove"),
        ("sgd", "momentum=0.9, foo=1", r"has foo, and optim=sgd takes momentum, dampening, weight_decay, nesterov;"),
    ],
)
def test_what_nobody_takes_is_refused(optimizer, given, message, tmp_path):
    args = NeoXTrainingArguments(str(tmp_path), use_cpu=True, precision="fp32", optim=optimizer, optim_args=given)
    with pytest.raises(RecipeError, match=f"train.optim_args='{given}' {message}"):
        NeoXTrainer.get_optimizer_cls_and_kwargs(args)


@pytest.mark.parametrize(
    ("optimizer", "given", "taken"),
    [
        ("sgd", "momentum=0.9, nesterov=true", {"momentum": 0.9, "nesterov": True}),
        ("adagrad", "lr_decay=0.1,eps=1e-6", {"lr_decay": 0.1, "eps": 1e-6}),
        ("rmsprop", "alpha=0.9,centered=yes", {"alpha": 0.9, "centered": True}),
    ],
)
def test_what_is_taken_arrives(optimizer, given, taken, tmp_path):
    args = NeoXTrainingArguments(str(tmp_path), use_cpu=True, precision="fp32", optim=optimizer, optim_args=given)
    kwargs = NeoXTrainer.get_optimizer_cls_and_kwargs(args)[1]
    assert {key: kwargs[key] for key in taken} == taken


@pytest.mark.parametrize("given", ["amsgrad", "momentum=0.9,", "momentum=0.9=1", " "])
def test_the_form_is_told(given):
    assert arguments_problem("sgd", given) == "is not of the form key=value,key=value"


@pytest.mark.parametrize("given", [None, "", "momentum=0.9"])
def test_nothing_is_wrong(given):
    assert arguments_problem("sgd", given) is None


def test_an_optimizer_that_is_given_all_refuses_by_itself():
    assert arguments_problem("rmsprop_bnb_8bit", "foo=1") is None


CHECKED = [name.value for name in OptimizerNames if taken_by(name.value) is not None]


@pytest.mark.parametrize("name", CHECKED)
def test_the_table_is_what_transformers_reads(name):
    """By the text of what makes each optimizer; of those of bitsandbytes one function makes all."""
    handler = _OPTIMIZER_HANDLERS[name]
    source = inspect.getsource(handler)
    read = set(re.findall(r'optim_args(?:\.get|\.pop)?[(\[]"(\w+)"', source))
    read |= set(re.findall(r'"(\w+)" in ctx\.optim_args', source))
    for keys in re.findall(r"for key in \(([^)]*)\)", source):
        read |= set(re.findall(r'"(\w+)"', keys))
    if "bitsandbytes" in handler.__name__ and "ademamix" not in name:
        read = set()
    assert read == set(taken_by(name))
