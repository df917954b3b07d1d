"""What a command line asks for, and how a script ends on a user's mistake."""

import sys

import pytest

from neox_hf.errors import CheckpointError, DataError, DivergenceError, RecipeError, TopologyError
from neox_hf.training.command_line import Command, exit_on_user_error, parse_command_line
from tests.forked import ForkedScript


def command(*paths, directory=None, overrides=(), dry_run=False):
    return Command(paths=paths, directory=directory, overrides=tuple(overrides), dry_run=dry_run)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--config", "a.yaml"], command("a.yaml")),
        (["--config=a.yaml", "-d", "recipes"], command("a.yaml", directory="recipes")),
        (["--config", "a", "b", "--dry-run"], command("a", "b", dry_run=True)),
        (["--config", "a", "--config", "b"], command("a", "b")),
        (["--config", "a", "x.y=1", "b", "z=2"], command("a", "b", overrides=["x.y=1", "z=2"])),
        (["x.y=1", "--config", "a", "--dry-run", "x.y=2"], command("a", overrides=["x.y=1", "x.y=2"], dry_run=True)),
        (["--config", "runs/lr=1/a.yaml"], command("runs/lr=1/a.yaml")),
    ],
)
def test_what_a_command_line_asks_for(argv, expected):
    assert parse_command_line(argv) == expected


def test_the_process_s_own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config", "a.yaml", "train.seed=1"])
    assert parse_command_line() == command("a.yaml", overrides=["train.seed=1"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --config"),
        (["--config"], "argument --config: expected at least one argument"),
        (["--config", "train.seed=1"], "argument --config: expected at least one argument"),
        (["--config", "a", "--dry"], "unrecognized arguments: --dry"),
        (["--config", "a", "--train.seed=1"], "unrecognized arguments: --train.seed=1"),
        (["a.yaml", "--config", "b"], "unrecognized arguments: a.yaml"),
    ],
)
def test_a_command_line_that_is_refused(argv, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    with pytest.raises(RecipeError) as error:
        parse_command_line(argv)
    usage = "usage: pretrain.py --config A.yaml [B.yaml ...] [-d DIR] [--dry-run] [section.key=value ...]"
    assert str(error.value) == f"{message}\n{usage}"


ERRORS = [(RecipeError, 2), (TopologyError, 2), (DataError, 3), (DivergenceError, 4), (CheckpointError, 6)]


@pytest.mark.parametrize(("error", "code"), ERRORS)
@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_a_user_error_ends_with_its_code(error, code, rank, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)

    @exit_on_user_error()
    def script():
        raise error("this is wrong")

    with pytest.raises(SystemExit) as ended:
        script()
    assert ended.value.code == code
    told = capsys.readouterr()
    assert told.out == ""
    if rank != "1":
        assert told.err == "error: this is wrong\n"
    elif error in (DataError, CheckpointError):
        assert told.err == "error on rank 1: this is wrong\n"
    else:
        assert told.err == ""


@pytest.mark.parametrize(("rank", "told"), [("0", "error: this is wrong\n"), ("1", "")])
def test_an_error_that_came_from_rank_0_is_told_once(rank, told, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    error = DataError("this is wrong")
    error.spoken_by_first_rank = True
    with pytest.raises(SystemExit), exit_on_user_error():
        raise error
    assert capsys.readouterr().err == told


def test_a_defect_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), exit_on_user_error():
        raise ZeroDivisionError


def test_without_an_error_nothing_happens():
    with exit_on_user_error():
        pass


def test_a_script_prints_no_traceback(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from neox_hf.training.command_line import exit_on_user_error, parse_command_line\n"
        "with exit_on_user_error():\n"
        "    parse_command_line()\n"
    )
    ended = ForkedScript(tmp_path / "log", script, "--confg", "a")
    assert ended.end() == 2
    assert ended.output.startswith("error: the following arguments are required: --config\nusage: script.py --config")
    assert "Traceback" not in ended.output
