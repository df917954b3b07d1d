"""A script as a user starts it, in a process that the fork server has imported everything for."""

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.gloo import fork_server, measured

ROOT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 240


class ForkedScript:
    """`python SCRIPT ARGUMENTS` from the project's folder: `script` is `__main__` in a process of its own.

    What a fresh interpreter would do besides is import, which takes it seconds. `prepare(**given)` runs before the
    script does.
    """

    def __init__(
        self, log: Path, script: str | Path, *arguments: str, prepare: Callable | None = None, **given: Any
    ) -> None:
        self.log = log
        self.process = fork_server().Process(target=_main, args=(log, str(script), arguments, prepare, given))
        self.process.start()

    @property
    def output(self) -> str:
        """What it has written to stdout and stderr."""
        return self.log.read_text()

    def end(self) -> int:
        """Its exit code."""
        self.process.join(TIMEOUT_SECONDS)
        return self.process.exitcode


def write_to(log: Path) -> None:
    """Send this process' stdout and stderr there, each line when it is whole."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))


def _main(log: Path, script: str, arguments: tuple[str, ...], prepare: Callable | None, given: dict[str, Any]) -> None:
    write_to(log)
    os.chdir(ROOT)
    if prepare is not None:
        prepare(**given)
    sys.argv = [script, *arguments]
    with measured(rank=0):
        runpy.run_path(script, run_name="__main__")
