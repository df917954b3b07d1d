"""Errors a user can meet, each with the exit code of the training process it ends.

Exit codes: 0 done, 2 recipe or topology, 3 data, 4 diverged, 6 checkpoint, 143 stopped by a signal after saving;
1 done, with a push still pending that the recipe requires.
"""


class RecipeError(ValueError):
    """A recipe, an override or a training argument is wrong. Nothing has been built yet."""

    exit_code = 2


class TopologyError(ValueError):
    """The world that was launched does not fit the recipe's parallel sizes."""

    exit_code = 2


class DataError(ValueError):
    """A source, a row, a tokenizer or a stream state cannot be used."""

    exit_code = 3


class DivergenceError(ArithmeticError):
    """Loss or gradients stopped being finite and the run's policy is to stop."""

    exit_code = 4


class CheckpointError(ValueError):
    """A checkpoint is incomplete, damaged, or does not belong to this run."""

    exit_code = 6
