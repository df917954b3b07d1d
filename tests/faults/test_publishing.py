"""A run that publishes: every checkpoint a revision, the final model with its card on `main`, whatever the network
does.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM as StockForCausalLM

from tests.gloo import fork_server
from tests.hub_server import TOKEN, HubServer, use_hub
from tests.layouts import LAYOUTS, world_size
from tests.runs import Runs, exit_codes

REPO = "tester/tiny"
PUSH = ["hub.push=true", f"hub.repo_id={REPO}", "hub.timeout=5", "hub.attempts=2", "hub.retry_wait=0.02"]
PUSH += ["train.max_steps=4"]
ALLOWED = {
    ".gitattributes",
    "README.md",
    "config.json",
    "generation_config.json",
    "loss_curve.png",
    "model.safetensors",
    "recipe.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("publishing"))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(TOKEN) as server:
        yield server


def all_files(hub: HubServer) -> Iterator[tuple[str, bytes]]:
    for commit in hub.repositories[REPO].commits.values():
        yield from commit.files.items()


def unpushed(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / ".hub-queue").glob("0*-*"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_checkpoints_become_revisions_and_main_has_card_and_curve(runs, hub, world_size):
    name, one = f"whole-{world_size}", "train.per_device_train_batch_size=1"
    evaluate = ["train.eval_strategy=steps", "train.eval_steps=2", "train.per_device_eval_batch_size=1"]
    codes = runs.run(name, *PUSH, *evaluate, one, world_size=world_size, prepare=use_hub, url=hub.url)
    assert codes == [0] * world_size, runs.message(name)
    assert hub.pushes == ["step2", "step4", "main"]
    assert "pushed to the Hub: step2, step4, main\n" in runs.message(name)
    assert unpushed(runs.folder / name) == []
    for step in (2, 4):
        local = runs.folder / name / f"checkpoint-{step}"
        for file in ("model.safetensors", "config.json", "tokenizer.json"):
            assert hub.files(REPO, f"step{step}")[file] == (local / file).read_bytes()
    main = hub.files(REPO)
    assert main["model.safetensors"] == hub.files(REPO, "step4")["model.safetensors"]
    assert main["loss_curve.png"].startswith(b"\x89PNG")
    assert_card(main["README.md"].decode(), tokens=4 * 2 * world_size * 32)
    assert {path for path, _ in all_files(hub)} <= ALLOWED
    assert not [path for path, content in all_files(hub) if TOKEN.encode() in content]


def assert_card(card: str, tokens: int) -> None:
    for text in ("license: apache-2.0", "loss_curve.png", "corpus.jsonl", f"{tokens:,}", "step2", "learning_rate"):
        assert text in card, f"the card does not tell {text}\n{card}"
    assert f'from_pretrained("{REPO}"' in card


def test_what_is_pushed_loads(runs, hub, tmp_path):
    from safetensors.torch import load
    from transformers import AutoTokenizer

    assert runs.run("loads", *PUSH, prepare=use_hub, url=hub.url) == [0], runs.message("loads")
    for path, content in hub.files(REPO, "step4").items():
        (tmp_path / path).write_bytes(content)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == 256
    assert load(hub.files(REPO)["model.safetensors"])["embed_out.weight"].shape == (384, 32)


@pytest.mark.parametrize("layout", ["pp2-tp2", "zero3"])
def test_a_run_of_any_layout_publishes(layout, runs, hub, tmp_path):
    """Where several ranks write the weights, what is pushed is whole all the same, and stock transformers loads it."""
    sizes = LAYOUTS[layout]
    parallel = [f"parallel.{name}={size}" for name, size in sizes.items() if name != "data"]
    shares = [*parallel, "train.per_device_train_batch_size=1"]
    codes = runs.run(layout, *PUSH, *shares, world_size=world_size(sizes), prepare=use_hub, url=hub.url)
    assert set(codes) == {0}, runs.message(layout)
    assert hub.pushes == ["step2", "step4", "main"]
    assert not [path for path, _ in all_files(hub) if path.startswith("state")]
    for revision, folder in (("step2", runs.folder / layout / "checkpoint-2"), ("main", runs.folder / layout)):
        (tmp_path / revision).mkdir()
        for path, content in hub.files(REPO, revision).items():
            (tmp_path / revision / path).write_bytes(content)
        pushed, local = (
            StockForCausalLM.from_pretrained(place).state_dict() for place in (tmp_path / revision, folder)
        )
        assert all(torch.equal(pushed[name], local[name]) for name in local)


@pytest.mark.parametrize(("required", "code"), [(False, 0), (True, 1)])
def test_a_dead_server_does_not_stop_training(runs, hub, required, code):
    name = f"dead-{required}"
    hub.script(".*", times=10_000, status=503)
    options = [*PUSH, f"hub.require_push={json.dumps(required)}"]
    assert runs.run(name, *options, prepare=use_hub, url=hub.url) == [code], runs.message(name)
    message, folder = runs.message(name), runs.folder / name
    assert "pushed to the Hub: nothing" in message
    assert "not pushed: step2 (" in message
    assert f"push later with: python -m neox_hf.checkpoint.hub.push {folder}\n" in message
    assert "load it with:" in message
    assert hub.pushes == []
    assert unpushed(folder) == ["000001-step2", "000002-step4", "000003-main"]

    if required:
        hub.heal()
        command = fork_server().Process(target=push_later, args=(hub.url, folder))
        command.start()
        assert exit_codes([command]) == [0]
        assert hub.pushes == ["step2", "step4", "main"]
        assert hub.files(REPO)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def push_later(url: str, folder: Path) -> None:
    """What the command runs."""
    import sys

    from neox_hf.checkpoint.hub.push import main

    use_hub(url=url)
    sys.exit(main([str(folder)]))


def test_offline_nothing_is_asked_and_the_next_run_pushes(runs, hub):
    assert runs.run("offline", *PUSH, prepare=use_hub, url=hub.url, offline=True) == [0], runs.message("offline")
    assert hub.requests == []
    assert "HF_HUB_OFFLINE" in runs.message("offline")
    assert "push later with: " in runs.message("offline")
    assert runs.run("offline", *PUSH, "train.max_steps=6", prepare=use_hub, url=hub.url) == [0]
    assert hub.pushes[:2] == ["step2", "step4"]
    assert hub.pushes[-2:] == ["step6", "main"]


def test_a_stopped_run_keeps_its_pushes_for_the_next(runs, hub):
    hub.script(".*", times=10_000, status=503)
    assert runs.run("stopped", *PUSH, prepare=stop_at, url=hub.url, at_step=2) == [143], runs.message("stopped")
    assert "not pushed: step2 (" in runs.message("stopped")
    hub.heal()
    assert runs.run("stopped", *PUSH, prepare=use_hub, url=hub.url) == [0], runs.message("stopped")
    assert hub.pushes == ["step2", "step3", "step4", "main"]


def stop_at(rank: int, url: str, at_step: int) -> None:
    import signal

    from tests.faults.test_interruptions import signal_self

    use_hub(url=url)
    signal_self(rank, signal.SIGTERM, at_step=at_step, on_rank=0)


def test_a_diverged_run_tells_what_it_did_not_push(runs, hub):
    from tests.faults.test_exit_codes import last_line

    hub.script(".*", times=10_000, status=503)
    assert runs.run("diverged", *PUSH, prepare=diverge, url=hub.url) == [4], runs.message("diverged")
    assert "not pushed: step2 (" in runs.message("diverged")
    assert last_line(runs, "diverged").startswith("error: step 4: the gradient norm is nan")


def diverge(rank: int, url: str) -> None:
    from tests.faults.test_exit_codes import spoil

    use_hub(url=url)
    spoil(rank, at_steps=[4])
