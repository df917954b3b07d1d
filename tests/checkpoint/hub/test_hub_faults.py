"""What a publisher makes of a Hub that answers badly, or not at all."""

import json
import time

import pytest
from huggingface_hub import constants

from neox_hf.checkpoint.hub import HubPublisher
from neox_hf.checkpoint.hub.faults import Rejected, Unreachable, as_fault
from neox_hf.checkpoint.settings import HubSettings

REPO = "tester/tiny"


def publish(settings, tmp_path, folder, step=1):
    publisher = HubPublisher(settings, tmp_path)
    publisher.publish_step(folder, step)
    return publisher.close(60)


@pytest.mark.parametrize("status", [409, 412, 429, 500, 503])
def test_a_commit_that_fails_for_a_while_is_made_in_the_end(hub, settings, checkpoint, tmp_path, status):
    hub.script("POST .*/commit/", times=2, status=status)
    assert publish(settings, tmp_path, checkpoint(1)).pushed == ["step1"]
    assert sum("/commit/" in request and request.startswith("POST") for request in hub.requests) == 3


@pytest.mark.parametrize("where", ["POST /api/repos/create", "POST .*/branch/", "GET .*/commits/", "GET .*/tree/"])
def test_any_request_may_fail_once(hub, settings, checkpoint, tmp_path, where):
    hub.script(where, status=502)
    assert publish(settings, tmp_path, checkpoint(1)).pushed == ["step1"]


def test_a_connection_cut_in_the_middle_of_an_upload_is_made_again(hub, settings, checkpoint, tmp_path):
    folder = checkpoint(1)
    hub.script("PUT /lfs/", drop=True)
    assert publish(settings, tmp_path, folder).pushed == ["step1"]
    assert hub.files(REPO, "step1")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_silent_server_is_given_up_and_tried_again(hub, checkpoint, tmp_path):
    hub.script("POST .*/commit/", hang=True)
    settings = HubSettings(repo_id=REPO, timeout=0.3, attempts=3, retry_wait=0.02)
    assert publish(settings, tmp_path, checkpoint(1)).pushed == ["step1"]


def test_existing_repository_and_branch_are_used(hub, settings, checkpoint, tmp_path):
    publish(settings, tmp_path, checkpoint(1))
    report = publish(settings, tmp_path, checkpoint(2), step=1)
    assert report.pushed == ["step1"]
    assert json.loads(hub.files(REPO, "step1")["config.json"])["step"] == 2


@pytest.mark.parametrize(
    ("status", "where", "reason"),
    [
        (401, "POST", "does not accept the token (401)"),
        (403, "POST .*/commit/", "may not write to this repository (403)"),
        (402, "POST .*/commit/", "no space left"),
        (404, "POST .*/branch/", "was not found (404)"),
    ],
)
def test_a_refusal_is_not_tried_again(hub, settings, checkpoint, tmp_path, status, where, reason):
    hub.script(where, times=1000, status=status)
    publisher = HubPublisher(settings, tmp_path)
    for step in (1, 2):
        publisher.publish_step(checkpoint(step), step)
    report = publisher.close(60)
    assert [revision for revision, _ in report.pending] == ["step1", "step2"]
    assert all(reason in why for _, why in report.pending)
    assert len([request for request in hub.requests if request.startswith("POST /api/repos/create")]) == 1


def test_a_wrong_token_is_a_refusal(hub, settings, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "Wrong" * 8)
    ((revision, reason),) = publish(settings, tmp_path, checkpoint(1)).pending
    assert revision == "step1"
    assert "does not accept the token" in reason
    assert "Wrong" not in reason


def test_without_a_token_everything_stays_queued(hub, settings, checkpoint, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    report = publish(settings, tmp_path, checkpoint(1))
    assert report.pending == [("step1", "there is no access token: set HF_TOKEN, or log in with `hf auth login`")]
    assert hub.requests == []


def test_offline_everything_stays_queued(hub, settings, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert publish(settings, tmp_path, checkpoint(1)).pending == [("step1", "offline mode is on (HF_HUB_OFFLINE)")]
    assert hub.requests == []


def test_a_server_that_stays_down_uses_up_the_attempts_of_one_entry_only(hub, settings, checkpoint, tmp_path):
    hub.script("POST /api/repos/create", times=1000, status=500)
    publisher = HubPublisher(settings, tmp_path)
    for step in (1, 2, 3):
        publisher.publish_step(checkpoint(step), step)
    report = publisher.close(60)
    assert report.pending == [(f"step{step}", "the Hub answered 500") for step in (1, 2, 3)]


def test_an_entry_set_aside_is_tried_again_after_one_that_worked(hub, settings, checkpoint, tmp_path):
    hub.script("POST .*/commit/step1", times=3, status=500)
    publisher = HubPublisher(settings, tmp_path)
    publisher.publish_step(checkpoint(1), 1)
    wait_for(lambda: len([r for r in hub.requests if "/commit/step1" in r]) == 3)
    publisher.publish_step(checkpoint(2), 2)
    wait_for(lambda: hub.pushes == ["step2", "step1"])
    assert publisher.close(60).pushed == ["step2", "step1"]


def test_a_server_may_say_how_long_to_wait(hub, settings, checkpoint, tmp_path):
    hub.script("POST .*/branch/", status=429, headers={"Retry-After": "1"})
    publisher = HubPublisher(settings, tmp_path)
    publisher.publish_step(checkpoint(1), 1)
    wait_for(lambda: any("/branch/" in request for request in hub.requests))
    time.sleep(0.3)
    assert hub.pushes == []
    wait_for(lambda: hub.pushes == ["step1"])
    publisher.close(60)


def test_one_bad_card_does_not_stop_the_other_revisions(hub, settings, checkpoint, tmp_path):
    publisher = HubPublisher(settings, tmp_path)
    publisher.publish_final(checkpoint(1), {"README.md": "---\nbroken\n---\n"})
    publisher.publish_step(checkpoint(2), 2)
    report = publisher.close(60)
    assert report.pushed == ["step2"]
    ((revision, reason),) = report.pending
    assert revision == "main"
    assert "Invalid metadata in README.md. - metadata is broken" in reason


def test_what_no_answer_means():
    assert isinstance(as_fault(ConnectionResetError("reset")), Unreachable)
    assert isinstance(as_fault(json.JSONDecodeError("a login page", "<html>", 0)), Unreachable)
    assert isinstance(as_fault(ValueError("malformed")), Rejected)
    assert isinstance(as_fault(FileNotFoundError("model.safetensors")), Rejected)
    assert str(as_fault(OSError("no route\nto host"))) == "OSError: no route to host"


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the publisher did not get there"
        time.sleep(0.01)
