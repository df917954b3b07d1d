"""Which steps are saved, and which of them rotation must keep."""

import pytest
from transformers import TrainerControl, TrainerState

from neox_hf.training.save_schedule import SaveSchedule, is_protected, is_scheduled


def test_pythia_is_the_released_schedule():
    steps = [step for step in range(4001) if is_scheduled(step, "pythia")]
    assert steps == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 3000, 4000]
    assert sum(is_scheduled(step, "pythia") for step in range(143001)) == 154


def test_only_log_spaced_and_listed_steps_are_protected():
    assert is_protected(512, "pythia")
    assert not is_protected(1000, "pythia")
    assert is_protected(7, [7, 9])
    assert not is_protected(8, [7, 9])
    assert not is_protected(8, "every")


@pytest.mark.parametrize(
    ("schedule", "step", "saves"),
    [
        ("pythia", 2, True),
        ("pythia", 3, False),
        ("pythia", 10, True),
        ([3], 3, True),
        ([3], 4, False),
        ("none", 10, False),
        ("every", 4, False),
    ],
)
def test_callback_asks_at_scheduled_steps_and_at_the_end(schedule, step, saves):
    state = TrainerState(global_step=step, max_steps=10)
    control = SaveSchedule(schedule).on_step_end(None, state, TrainerControl())
    assert control.should_save is saves
