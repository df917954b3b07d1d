"""At which steps a checkpoint is written."""

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

PYTHIA_LOG_SPACED = frozenset([0, *(2**power for power in range(10))])
PYTHIA_INTERVAL = 1000


def is_scheduled(step: int, schedule: str | list[int]) -> bool:
    """Whether `schedule` names `step` itself: such a checkpoint is kept whatever `save_total_limit` says.

    `pythia` is 0, 1, 2, 4 ... 512, then every 1000, the revisions released with the Pythia models. `every` and `none`
    name no step: the first leaves the choice to `save_steps`.
    """
    if schedule == "pythia":
        return step in PYTHIA_LOG_SPACED or (step > 0 and step % PYTHIA_INTERVAL == 0)
    return step in schedule if isinstance(schedule, list) else False


def is_protected(step: int, schedule: str | list[int]) -> bool:
    """Whether rotation must keep the checkpoint of `step`: Pythia's log-spaced ones, and listed steps."""
    if schedule == "pythia":
        return step in PYTHIA_LOG_SPACED
    return is_scheduled(step, schedule)


class SaveSchedule(TrainerCallback):
    """Asks for a checkpoint at the schedule's steps, and at the last step so that the run can be continued.

    Step 0 is the trainer's own to save: no step has ended yet. `every` is left to HF's `save_steps`.
    """

    def __init__(self, schedule: str | list[int]) -> None:
        self.schedule = schedule

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        if self.schedule not in ("every", "none"):
            last = state.global_step >= state.max_steps
            control.should_save = control.should_save or last or is_scheduled(state.global_step, self.schedule)
        return control
