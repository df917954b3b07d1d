"""What a split model cannot do is refused by name, before anything trains."""

from types import SimpleNamespace

import pytest
from torch import nn

from neox_hf.data import EvaluationBatches, TokenStream
from neox_hf.parallel.topology import Topology
from neox_hf.training.pipeline_limits import check_batches, check_prediction, check_trainer, check_trains


def fitting_trainer(**changes) -> SimpleNamespace:
    """What `check_trainer` reads of a trainer, all of it allowed."""
    args = {"auto_find_batch_size": False, "neftune_noise_alpha": None, "label_smoothing_factor": 0.0, "deepspeed": {1}}
    args["average_tokens_across_devices"] = True
    fields = {
        "compute_metrics": None,
        "preprocess_logits_for_metrics": None,
        "compute_loss_func": None,
        "model_init": None,
        "train_dataset": object.__new__(TokenStream),
        "eval_dataset": object.__new__(EvaluationBatches),
    }
    args |= {key: changes.pop(key) for key in list(changes) if key in args}
    return SimpleNamespace(args=SimpleNamespace(**args), topology=Topology(pipeline=2), **(fields | changes))


def test_a_run_over_streams_fits():
    check_trainer(fitting_trainer())
    check_trainer(fitting_trainer(eval_dataset=None))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("compute_metrics", max),
        ("preprocess_logits_for_metrics", max),
        ("compute_loss_func", max),
        ("model_init", max),
        ("auto_find_batch_size", True),
        ("neftune_noise_alpha", 5.0),
        ("label_smoothing_factor", 0.1),
        ("average_tokens_across_devices", False),
    ],
)
def test_refused_by_name(name, value):
    wanted = rf"{name}.* does not work with 2 = 2 pipeline x 1 data x 1 tensor: .* parallel.tensor=1"
    with pytest.raises(ValueError, match=wanted):
        check_trainer(fitting_trainer(**{name: value}))


def test_data_that_would_differ_in_a_replica():
    with pytest.raises(ValueError, match=r"train_dataset is a list; with .* it must be of TokenStream"):
        check_trainer(fitting_trainer(train_dataset=[1]))
    with pytest.raises(ValueError, match=r"eval_dataset is a list; with .* it must be of EvaluationBatches"):
        check_trainer(fitting_trainer(eval_dataset=[1]))


def test_arguments_without_deepspeed():
    with pytest.raises(ValueError, match="needs DeepSpeed: pass deepspeed=deepspeed_config"):
        check_trainer(fitting_trainer(deepspeed=None))


def test_a_step_with_too_few_micro_batches():
    check_batches(4, 4)
    with pytest.raises(ValueError, match="a step has 3 micro-batches where gradient_accumulation_steps=4"):
        check_batches(3, 4)


def test_a_stage_that_is_frozen():
    stage, topology = nn.Linear(2, 2), Topology(pipeline=3, rank=1)
    stage.weight.requires_grad_(False)
    check_trains(stage, topology)
    stage.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is trained on pipeline stage 1 of 3: every parameter there is"):
        check_trains(stage, topology)


def test_predicting():
    batches = object.__new__(EvaluationBatches)
    check_prediction(batches, True)
    with pytest.raises(ValueError, match="predict does not work with a split model"):
        check_prediction(batches, None)
    with pytest.raises(ValueError, match="evaluation over a list; a split model is evaluated over EvaluationBatches"):
        check_prediction([], True)
