"""A run publishes: order, bytes, what stays behind, and a trainer that never waits."""

import hashlib
import shutil
import time
from dataclasses import replace

import pytest

from neox_hf.checkpoint.hub import HubPublisher
from neox_hf.checkpoint.settings import HubSettings
from neox_hf.errors import RecipeError

REPO = "tester/tiny"
PUSHED_FILES = {".gitattributes", "config.json", "model.safetensors", "tokenizer.json"}


def sums(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items() if name != ".gitattributes"}


def local_sums(folder) -> dict[str, str]:
    wanted = ("config.json", "model.safetensors", "tokenizer.json")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in wanted}


def test_steps_queued_faster_than_they_upload_arrive_in_order_with_their_own_bytes(hub, settings, checkpoint, tmp_path):
    hub.script("POST /api/repos/create", status=503)  # nothing goes up before all five are queued
    publisher = HubPublisher(replace(settings, retry_wait=0.5), tmp_path)
    expected = {}
    for step in (1, 2, 3, 4, 5):
        folder = checkpoint(step)
        expected[f"step{step}"] = local_sums(folder)
        publisher.publish_step(folder, step)
        shutil.rmtree(folder)  # as rotation does, whether or not the upload has begun
    assert hub.pushes == []
    report = publisher.close(60)

    assert report.pending == []
    assert report.pushed == hub.pushes == list(expected)
    for revision, wanted in expected.items():
        assert sums(hub.files(REPO, revision)) == wanted
    assert not list((tmp_path / ".hub-queue").glob("*-*")), "pushed entries leave the queue"
    assert "push later" not in str(report)


def test_every_branch_starts_from_the_initial_commit(hub, settings, checkpoint, tmp_path):
    publisher = HubPublisher(settings, tmp_path)
    publisher.publish_final(checkpoint(9))
    publisher.publish_step(checkpoint(1), 1)
    assert publisher.close(60).pushed == ["main", "step1"]
    history = hub.repositories[REPO].history("step1")
    assert [commit.title for commit in history] == ["Step 1", "initial commit"]


def test_nothing_private_is_in_any_commit(hub, settings, checkpoint, tmp_path):
    publisher = HubPublisher(settings, tmp_path)
    folder = checkpoint(1)
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(b"not ours")
    (folder / "linked.safetensors").symlink_to(outside)
    publisher.publish_step(folder, 1)
    publisher.publish_final(folder)
    publisher.close(60)
    commits = hub.repositories[REPO].commits.values()
    assert {name for commit in commits for name in commit.files} == PUSHED_FILES
    assert not any(hub.token.encode() in content for commit in commits for content in commit.files.values())


@pytest.mark.parametrize("private", [True, False])
def test_the_repository_is_private_when_asked(hub, settings, checkpoint, tmp_path, private):
    publisher = HubPublisher(HubSettings(repo_id=REPO, private=private, timeout=5.0), tmp_path)
    publisher.publish_step(checkpoint(1), 1)
    assert publisher.close(60).pushed == ["step1"]
    assert hub.repositories[REPO].private is private


def test_the_final_model_carries_its_card_and_replaces_older_shards(hub, settings, checkpoint, tmp_path):
    sharded = checkpoint(1)
    (sharded / "model.safetensors").rename(sharded / "model-00001-of-00001.safetensors")
    (sharded / "model.safetensors.index.json").write_text("{}")
    first = HubPublisher(settings, tmp_path)
    first.publish_final(sharded)
    first.close(60)

    whole = checkpoint(2)
    (whole / "README.md").write_text("an old card")
    second = HubPublisher(settings, tmp_path)
    second.publish_final(whole, {"README.md": "# the card"})
    assert second.close(60).pushed == ["main"]
    files = hub.files(REPO)
    assert set(files) == PUSHED_FILES | {"README.md"}
    assert files["README.md"] == b"# the card"
    assert sums(files)["model.safetensors"] == local_sums(whole)["model.safetensors"]


def test_weights_in_folders_are_somebody_elses(hub, settings, checkpoint, tmp_path):
    folder = checkpoint(1)
    first = HubPublisher(settings, tmp_path)
    first.publish_final(folder)
    first.close(60)
    theirs = {"onnx/model.safetensors": b"theirs", "adapter/adapter_config.json": b"{}"}
    hub.repositories[REPO].commit("main", "theirs", hub.files(REPO) | theirs)
    (folder / "config.json").write_text("{}")
    again = HubPublisher(settings, tmp_path)
    again.publish_final(folder)
    assert again.close(60).pushed == ["main"]
    assert set(hub.files(REPO)) == PUSHED_FILES | set(theirs)


def test_publishing_the_same_checkpoint_again_makes_no_second_commit(hub, settings, checkpoint, tmp_path):
    folder = checkpoint(1)
    for _ in range(2):
        publisher = HubPublisher(settings, tmp_path)
        publisher.publish_step(folder, 1)
        assert publisher.close(60).pushed == ["step1"]
    assert hub.pushes == ["step1"]


def test_publishing_does_not_wait_for_a_silent_server(hub, checkpoint, tmp_path):
    hub.script(".*", times=1000, hang=True)
    publisher = HubPublisher(HubSettings(repo_id=REPO, timeout=30.0), tmp_path)
    folder = checkpoint(1)
    started = time.monotonic()
    publisher.publish_step(folder, 1)
    assert time.monotonic() - started < 1.0
    report = publisher.close(0.2)
    assert time.monotonic() - started < 2.0
    assert report.pushed == []
    assert report.pending == [("step1", "the upload had not ended when 0.2 s had passed")]
    assert f"push later with: python -m neox_hf.checkpoint.hub.push {tmp_path}" in str(report)


def test_a_checkpoint_that_cannot_be_queued_is_reported_and_not_raised(hub, settings, checkpoint, tmp_path):
    folder = checkpoint(1)
    (folder / "model.safetensors").unlink()
    publisher = HubPublisher(settings, tmp_path)
    publisher.publish_step(folder, 1)
    publisher.publish_step(tmp_path / "checkpoint-2", 2)
    (empty, no_weights), (missing, no_folder) = publisher.close(60).pending
    assert (empty, missing) == ("step1", "step2")
    assert "holds no *.safetensors file" in no_weights
    assert "it was not queued" in no_folder
    assert "No such file" in no_folder


def test_a_publisher_without_a_repository_is_a_recipe_error(tmp_path):
    with pytest.raises(RecipeError, match=r"publishing needs a repository; set hub\.repo_id=owner/name"):
        HubPublisher(HubSettings(), tmp_path)


def test_a_bug_in_the_thread_becomes_a_reason(hub, settings, checkpoint, tmp_path, monkeypatch):
    publisher = HubPublisher(settings, tmp_path)
    monkeypatch.setattr(publisher._queue, "remove", lambda entry: 1 / 0)
    publisher.publish_step(checkpoint(1), 1)
    assert publisher.close(60).pending == [
        ("step1", "publishing stopped by ZeroDivisionError: division by zero"),
    ]
