"""A run that is resumed under another schedule, or the same one with other numbers: whose rate it goes on with."""

import logging

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau, StepLR

from neox_hf.training import hyperparameters, run_state
from neox_hf.training.hyperparameters import RecipeHyperparameters
from neox_hf.training.schedule_progress import note_initial_rates, schedule_state
from tests.training.test_trainer_by_hand import Words, make, small_model  # noqa: F401 (make is a fixture)

HALVING = {"factor": 0.5, "patience": 0, "threshold": 10.0, "threshold_mode": "abs"}
PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": HALVING}
GREEDY = {"lr_scheduler_type": "greedy", "lr_scheduler_kwargs": {**HALVING, "min_lr": 1e-6, "max_lr": 1e-2}}
LINEAR = {"lr_scheduler_type": "linear"}
COSINE = {"lr_decay_style": "cosine", "lr_decay_steps": 8, "min_lr": 1e-3}
FOLLOWERS = [pytest.param(PLATEAU, id="plateau"), pytest.param(GREEDY, id="greedy")]
FORMULAS = [pytest.param(LINEAR, id="linear"), pytest.param(COSINE, id="cosine")]


@pytest.fixture
def train(make):  # noqa: F811
    def train(schedule: dict, steps: int, resumed=None, model=None, **given):
        """Trained for `steps`, saved at the end, on from the last checkpoint of the trainer `resumed`."""
        values = {"max_steps": steps, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
        values |= {"save_strategy": "steps", "save_steps": 3, **schedule, **given}
        own = values.pop("trainer", {})
        trainer = make(model, trainer={"eval_dataset": Words(), **own}, **values)
        trainer.train(None if resumed is None else last_checkpoint(resumed))
        return trainer

    return train


def last_checkpoint(trainer) -> str:
    return f"{trainer.args.output_dir}/checkpoint-{trainer.state.global_step}"


def rates(trainer, after: int = 0) -> list[float]:
    return [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e and e["step"] > after]


@pytest.mark.parametrize("follower", FOLLOWERS)
def test_a_follower_of_evaluations_begins_with_the_recipes_rate(follower, train, caplog):
    whole = train(follower, 3)
    caplog.clear()
    resumed = train(follower, 6, train(LINEAR, 3))
    assert rates(resumed, 3) == rates(whole) == [1e-2, 1e-2, 5e-3]
    assert "; the checkpoint had LambdaLR: from step 3 on the learning rate is 0.01" in caplog.text


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("follower", FOLLOWERS)
def test_a_formula_stands_where_the_step_is(follower, formula, train, caplog):
    whole, before = train(formula, 6), train(follower, 3)
    caplog.clear()
    resumed = train(formula, 6, before)
    assert rates(resumed, 3) == rates(whole, 3)
    assert resumed.lr_scheduler.last_epoch == 6
    kind = before.lr_scheduler.__class__.__name__
    assert f"resumed with the schedule LambdaLR; the checkpoint had {kind}: from step 3 on" in caplog.text


def test_one_follower_after_the_other(train, caplog):
    resumed = train(GREEDY, 6, train(PLATEAU, 3))
    assert rates(resumed, 3) == rates(train(GREEDY, 3))
    assert "resumed with the schedule GreedyLR; the checkpoint had ReduceLROnPlateau" in caplog.text


@pytest.mark.parametrize("follower", FOLLOWERS)
def test_a_follower_goes_on_as_if_never_stopped(follower, train, caplog):
    whole, before = train(follower, 6), train(follower, 3)
    caplog.clear()
    resumed = train(follower, 6, before)
    assert rates(resumed) == rates(whole) == [1e-2, 1e-2, 5e-3, 2.5e-3, 1.25e-3, 6.25e-4]
    assert all(torch.equal(*both) for both in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))
    assert "resumed with" not in caplog.text


@pytest.mark.parametrize("follower", FOLLOWERS)
def test_another_rate_keeps_the_reduction(follower, train, caplog):
    """Also where the checkpoint is one of a run that was resumed with it."""
    before = train(follower, 3)
    caplog.clear()
    second = train(follower, 6, before, learning_rate=1e-3)
    assert rates(second, 3) == pytest.approx([2.5e-4, 1.25e-4, 6.25e-5])
    assert "resumed with initial_lr=0.001; the checkpoint had 0.01" in caplog.text
    third = train(follower, 9, second, learning_rate=1e-2)
    assert rates(third, 6) == pytest.approx([1e-2 / 32, 1e-2 / 64, 1e-2 / 128])
    assert getattr(third.lr_scheduler, "_init_lrs", [1e-2, 1e-2]) == [1e-2, 1e-2]


def test_a_rate_of_zero_leaves_no_reduction_to_keep(train):
    resumed = train(PLATEAU, 6, train(PLATEAU, 3, learning_rate=0.0))
    assert rates(resumed, 3)[0] == 1e-2


@pytest.mark.parametrize("follower", FOLLOWERS)
def test_settings_of_a_follower_are_the_recipes(follower, train, caplog):
    changed = {**follower, "lr_scheduler_kwargs": {**follower["lr_scheduler_kwargs"], "factor": 0.1}}
    before = train(follower, 3)
    caplog.clear()
    resumed = train(changed, 6, before)
    assert rates(resumed, 3) == pytest.approx([2.5e-3, 2.5e-4, 2.5e-5])
    assert "resumed with factor=0.1 of the schedule; the checkpoint had 0.5" in caplog.text
    assert caplog.text.count("of the schedule; the checkpoint had") == 1


def test_the_rate_of_the_first_checkpoint_is_reduced_by_nothing(train):
    first = train(PLATEAU, 3, save_schedule=[0])
    first.state.global_step = 0
    assert rates(train(PLATEAU, 3, first, learning_rate=1e-3)) == [1e-3, 1e-3, 5e-4]


@pytest.mark.parametrize("follower", FOLLOWERS)
def test_a_second_train_of_one_trainer_goes_on(follower, train):
    """Whose optimizer is the first one's, with the rate that that has come to."""
    trainer = train(follower, 3)
    trainer.args.max_steps = 6
    trainer.train("latest")
    assert rates(trainer) == [1e-2, 1e-2, 5e-3, 2.5e-3, 1.25e-3, 6.25e-4]


@pytest.fixture
def older(train, monkeypatch):
    """Trains as versions did that said neither a schedule's kind nor what its rate came from."""

    def older(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(run_state, "schedule_state", lambda scheduler: scheduler.state_dict())
            for module in (run_state, hyperparameters):
                patch.setattr(module, "note_initial_rates", lambda optimizer: None)
            return train(*args, **kwargs)

    return older


@pytest.mark.parametrize("follower", FOLLOWERS)
def test_an_older_checkpoint_goes_on(follower, older, train, caplog):
    whole, before = train(follower, 6), older(follower, 3)
    caplog.clear()
    resumed = train(follower, 6, before)
    assert rates(resumed) == rates(whole)
    assert "initial_lr" not in caplog.text


def test_an_older_checkpoint_of_a_greedy_schedule_has_its_first_rate(older, train, caplog):
    before = older(GREEDY, 3)
    caplog.clear()
    assert rates(train(GREEDY, 6, before, learning_rate=1e-3), 3) == pytest.approx([2.5e-4, 1.25e-4, 6.25e-5])


def test_an_older_checkpoint_of_a_plateau_has_not_and_that_is_told(older, train, caplog):
    before = older(PLATEAU, 3)
    caplog.clear()
    second = train(PLATEAU, 6, before, learning_rate=1e-3)
    assert rates(second, 3) == [2.5e-3, 1.25e-3, 6.25e-4]
    told = "resumed with the checkpoint's learning rate 0.0025 and not with train.learning_rate=0.001: a checkpoint of"
    assert told in caplog.text


@pytest.mark.parametrize(("before", "then"), [(LINEAR, PLATEAU), (GREEDY, LINEAR), (PLATEAU, GREEDY)])
def test_the_kind_of_an_older_checkpoint_is_found(before, then, older, train, caplog):
    resumed = train(then, 6, older(before, 3))
    assert rates(resumed, 3) == rates(train(then, 6 if then is LINEAR else 3), 3 if then is LINEAR else 0)
    assert "resumed with the schedule" in caplog.text


@pytest.mark.parametrize(("rate", "factor"), [(1e-2, 1.0), (1e-3, 0.1)])
def test_a_schedule_of_the_users_own_keeps_its_reduction(rate, factor, train):
    def of_his_own(steps, rate, resumed=None):
        model = small_model()
        optimizer = SGD(model.parameters(), lr=rate)
        return train({}, steps, resumed, model, trainer={"optimizers": (optimizer, StepLR(optimizer, 2, 0.5))})

    whole = of_his_own(6, 1e-2)
    resumed = of_his_own(6, rate, of_his_own(3, 1e-2))
    assert rates(resumed, 3) == pytest.approx([factor * r for r in rates(whole, 3)], rel=1e-12)


SCHEDULES = {
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "step": lambda optimizer: StepLR(optimizer, 2, 0.5),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 10),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=0),
}


def scheduled(name: str, rate: float = 1e-2) -> tuple[SGD, object]:
    optimizer = SGD([torch.nn.Parameter(torch.ones(2))], lr=rate)
    return optimizer, SCHEDULES[name](optimizer)


@pytest.mark.parametrize("before", SCHEDULES)
@pytest.mark.parametrize("then", ["lambda", "step", "cosine"])
def test_whatever_was_before_a_schedule_by_steps_stands_at_the_step(before, then, caplog):
    """And goes on from there as one that was there from the first step on."""
    caplog.set_level(logging.WARNING)
    saved, saved_schedule = scheduled(before)
    note_initial_rates(saved)
    wanted, wanted_schedule = scheduled(then)
    saved.step(), wanted.step()  # or torch warns
    for _ in range(5):
        saved_schedule.step(*([1.0] if before == "plateau" else []))
        wanted_schedule.step()
    resumed, schedule = scheduled(then)
    recipe = RecipeHyperparameters(resumed, schedule)
    resumed.load_state_dict(saved.state_dict())
    recipe.apply(schedule_state(saved_schedule), 5)
    resumed.step()
    for _ in range(3):
        assert resumed.param_groups[0]["lr"] == pytest.approx(wanted.param_groups[0]["lr"], rel=1e-12)
        assert schedule.get_last_lr() == [resumed.param_groups[0]["lr"]]
        schedule.step()
        wanted_schedule.step()
    assert ("resumed with the schedule" in caplog.text) is (before != then)
