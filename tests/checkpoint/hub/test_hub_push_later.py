"""`python -m neox_hf.checkpoint.hub.push`: what a run left behind goes up later."""

import fcntl
import shutil
import signal
import threading
from pathlib import Path

import pytest

from neox_hf.checkpoint.hub import HubPublisher
from neox_hf.checkpoint.hub.push import main
from neox_hf.checkpoint.settings import HubSettings
from tests.forked import ForkedScript
from tests.gloo import fork_server
from tests.hub_server import use_hub
from tests.runs import exit_codes, kill_self

REPO = "tester/tiny"
COMMAND = "neox_hf/checkpoint/hub/push.py"


@pytest.fixture
def interrupted(hub, settings, checkpoint, tmp_path):
    """An output directory whose run could not push steps 1, 2 and the final model."""
    hub.script(".*", times=1000, status=403)
    publisher = HubPublisher(settings, tmp_path)
    for step in (1, 2):
        publisher.publish_step(checkpoint(step), step)
    publisher.publish_final(checkpoint(3), {"README.md": "# card"})
    assert [revision for revision, _ in publisher.close(60).pending] == ["step1", "step2", "main"]
    hub.heal()
    return tmp_path


def test_the_command_pushes_what_is_left_in_order_and_only_once(hub, interrupted, capsys):
    assert main([str(interrupted)]) == 0
    assert capsys.readouterr().out.strip() == "pushed to the Hub: step1, step2, main"
    assert hub.pushes == ["step1", "step2", "main"]
    assert hub.files(REPO)["README.md"] == b"# card"

    assert main([str(interrupted)]) == 0
    assert capsys.readouterr().out.strip() == "pushed to the Hub: nothing"
    assert hub.pushes == ["step1", "step2", "main"]


def test_the_command_may_push_elsewhere(hub, interrupted):
    assert main([str(interrupted), "--repo-id", "tester/other"]) == 0
    assert set(hub.repositories) == {"tester/other"}


def test_the_command_fails_when_something_is_still_queued(hub, interrupted, capsys):
    hub.script("POST .*/commit/step2", times=1000, status=400)
    assert main([str(interrupted)]) == 1
    out = capsys.readouterr().out
    assert "pushed to the Hub: step1, main" in out
    assert "not pushed: step2 (the Hub answered 400" in out
    assert f"push later with: python -m neox_hf.checkpoint.hub.push {interrupted}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not a folder; name the output_dir of a run"),
        ([".", "--repo-id", "no-owner"], "hub.repo_id='no-owner' is not of the form owner/name"),
        ([".", "--attempts", "0"], "hub.attempts=0 must be at least 1"),
    ],
)
def test_a_wrong_argument_ends_with_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_damaged_entry_is_named_and_does_not_stop_the_others(hub, interrupted, capsys):
    ledger = interrupted / ".hub-queue" / "000001-step1" / "ledger.json"
    ledger.write_text("{")
    assert main([str(interrupted)]) == 1
    out = capsys.readouterr().out
    assert "pushed to the Hub: step2, main" in out
    assert f"{ledger} cannot be read" in out
    assert f"delete the folder {ledger.parent}" in out


def test_the_next_run_pushes_what_the_crashed_one_left(hub, settings, interrupted):
    assert HubPublisher(settings, interrupted).close(60).pushed == ["step1", "step2", "main"]


def test_two_processes_do_not_push_at_once(hub, interrupted):
    with (interrupted / ".hub-queue" / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        command = threading.Thread(target=main, args=([str(interrupted)],))
        command.start()
        command.join(0.3)
        assert command.is_alive(), "it waits for its turn"
        assert hub.pushes == []
    command.join(30)
    assert hub.pushes == ["step1", "step2", "main"]


def publish_and_die(url: str, folder: Path, output_dir: Path) -> None:
    """A run that is offline, and killed as soon as its checkpoint is queued and gone from its place."""
    use_hub(url=url, offline=True)
    publisher = HubPublisher(HubSettings(repo_id=REPO), output_dir)
    publisher.publish_step(folder, 7)
    shutil.rmtree(folder)
    kill_self()


def test_after_a_killed_run_the_command_pushes_from_another_process(hub, checkpoint, tmp_path):
    """The run dies with nothing sent; its checkpoints are gone; the command finds all in the queue."""
    folder = checkpoint(7)
    weights = (folder / "model.safetensors").read_bytes()
    killed = fork_server().Process(target=publish_and_die, args=(hub.url, folder, tmp_path))
    killed.start()
    assert exit_codes([killed]) == [-signal.SIGKILL]
    assert not folder.exists()
    pushed = ForkedScript(tmp_path / "log", COMMAND, str(tmp_path), prepare=use_hub, url=hub.url)
    assert pushed.end() == 0, pushed.output
    assert pushed.output.strip() == "pushed to the Hub: step7"
    assert hub.files(REPO, "step7")["model.safetensors"] == weights
