"""The command line that every recipe script shares, and how a script ends when the user has made a mistake."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from neox_hf.config.overrides import is_override
from neox_hf.errors import CheckpointError, DataError, DivergenceError, RecipeError, TopologyError
from neox_hf.training.console import launched_rank

USAGE = "%(prog)s --config A.yaml [B.yaml ...] [-d DIR] [--dry-run] [section.key=value ...]"

SAME_ON_EVERY_RANK = (RecipeError, TopologyError, DivergenceError)
"""Errors that all ranks meet alike, so that one of them may speak for all."""

USER_ERRORS = (*SAME_ON_EVERY_RANK, DataError, CheckpointError)


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a command line asks for; `load_recipe` takes the first three."""

    paths: tuple[str, ...]
    directory: str | None
    overrides: tuple[str, ...]
    dry_run: bool


class RecipeParser(argparse.ArgumentParser):
    """Options that say which recipe; raises where argparse would print and exit, once on every rank."""

    def __init__(self, usage: str) -> None:
        super().__init__(usage=usage, allow_abbrev=False)
        self.add_argument("--config", nargs="+", action="extend", required=True, help="YAML files; later ones win")
        self.add_argument("-d", "--directory", help="folder that the files are relative to")

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}\nusage: {self.usage % {'prog': self.prog}}")

    def parse_with_overrides(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, tuple[str, ...]]:
        """The options, and whatever looks like `section.key=value`, wherever it stands."""
        options = self.parse_args([text for text in arguments if not is_override(text)])
        return options, tuple(text for text in arguments if is_override(text))


def parse_command_line(argv: Sequence[str] | None = None) -> Command:
    """Read `sys.argv[1:]`, or `argv`. Whatever looks like `section.key=value` is an override, wherever it stands.

    Raises:
        RecipeError: an unknown option, no file, or an argument that is neither.
    """
    parser = RecipeParser(USAGE)
    parser.add_argument("--dry-run", action="store_true", help="check the recipe, print what it comes to, and stop")
    options, overrides = parser.parse_with_overrides(sys.argv[1:] if argv is None else argv)
    return Command(
        paths=tuple(options.config), directory=options.directory, overrides=overrides, dry_run=options.dry_run
    )


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """As a decorator or `with`: a user's mistake ends the process with its exit code and a message, no traceback.

    Where every rank meets the same error, or has it from rank 0 (see `from_first_rank`), only rank 0 speaks. A data
    or checkpoint error may be one rank's alone, so each rank that meets it says so under its number.
    """
    try:
        yield
    except USER_ERRORS as error:
        rank = launched_rank()
        said_elsewhere = isinstance(error, SAME_ON_EVERY_RANK) or getattr(error, "spoken_by_first_rank", False)
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif not said_elsewhere:
            print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
