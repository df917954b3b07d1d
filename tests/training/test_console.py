"""What a script's log shows, on which rank, and that it is shown once."""

import logging
import re

import pytest

from neox_hf.training.console import launched_rank, log_to_stderr


@pytest.fixture
def logger():
    """Ours, put back afterwards as it was found."""
    ours = logging.getLogger("neox_hf")
    before = ours.handlers[:], ours.level, ours.propagate
    yield logging.getLogger("neox_hf.training.some_module")
    ours.handlers[:], ours.propagate = before[0], before[2]
    ours.setLevel(before[1])


def said(logger):
    logger.debug("a detail")
    logger.info("resuming from checkpoint-5")
    logger.warning("passed over")
    logger.error("lost")


def test_the_first_rank_says_everything_once(logger, capsys):
    log_to_stderr(0)
    log_to_stderr(0)
    said(logger)
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in capsys.readouterr().err.splitlines()]
    assert lines == ["INFO: resuming from checkpoint-5", "WARNING: passed over", "ERROR: lost"]


def test_another_rank_tells_its_errors_alone(logger, capsys):
    log_to_stderr(0)
    log_to_stderr(3)
    said(logger)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("ERROR on rank 3: lost")


def test_a_handler_of_the_root_logger_does_not_repeat_it(logger, caplog):
    log_to_stderr(0)
    said(logger)
    assert caplog.records == []


def test_the_rank_is_the_launcher_s(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert launched_rank() == 0
    monkeypatch.setenv("RANK", "2")
    assert launched_rank() == 2
