"""`recipes/pretrain.py` as a user runs it: alone, and under accelerate's launcher, which starts fresh interpreters."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forked import ROOT, TIMEOUT_SECONDS, ForkedScript
from tests.runs import tiny_recipe, write_corpus

SCRIPT = "recipes/pretrain.py"
PLAIN = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
ONE_ON_CPU = ["--cpu", "--num_processes", "1", *PLAIN]
TWO_ON_CPU = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0", *PLAIN]
WRONG = ["train.learning_rat=3e-4", "train.max_steps=many"]


class Launched:
    """A launcher of ours: its output goes to a file, so that it never waits for a reader."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def end(self) -> int:
        return self.process.wait(TIMEOUT_SECONDS)

    def kill(self) -> None:
        """A launcher's own processes too, which would train on without it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("script")
    write_corpus(folder / "corpus.jsonl")
    for name in ("alone", "pair", "stopped"):
        recipe = tiny_recipe(folder / "corpus.jsonl", folder / name)
        (folder / f"{name}.yaml").write_text(json.dumps(recipe))
    return folder


@pytest.fixture(scope="module")
def launched(folder) -> Iterator[dict[str, Launched]]:
    """All at once: most of their time is spent on imports."""
    endless = ["train.max_steps=10000", "train.save_steps=10000"]
    started = {
        "stopped": Launched(folder / "stopped.log", *ONE_ON_CPU, *job(folder, "stopped"), *endless),
        "wrong": Launched(folder / "launched-wrong.log", *ONE_ON_CPU, *job(folder, "alone"), *WRONG),
        "pair": Launched(folder / "pair.log", *TWO_ON_CPU, *job(folder, "pair"), "train.max_steps=2"),
    }
    yield started
    for command in started.values():
        command.kill()


def job(folder: Path, recipe: str) -> list[str]:
    return [SCRIPT, "--config", str(folder / f"{recipe}.yaml")]


def test_a_stopped_launcher_leaves_a_checkpoint_within_30_seconds(launched, folder):
    """First of all tests: until it is stopped, it trains on, and takes time from the others."""
    command, output_dir = launched["stopped"], folder / "stopped"
    wait_until(lambda: "'loss': " in command.output or command.process.poll() is not None, TIMEOUT_SECONDS)
    command.process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    wait_until(lambda: any(output_dir.glob("checkpoint-*")), 30)
    wait_until(lambda: "stopped by signal 15 after saving step" in command.output, 30 - (time.monotonic() - begin))
    assert command.end() != 0


def test_a_wrong_recipe_ends_with_code_2_and_no_traceback(folder):
    wrong = ForkedScript(folder / "wrong.log", *job(folder, "alone"), *WRONG)
    assert wrong.end() == 2
    lines = wrong.output.splitlines()
    start = lines.index("error: 2 problems:")
    assert lines[start + 1 :] == [
        f"  override '{WRONG[0]}': train.learning_rat = 0.0003: unknown key; did you mean train.learning_rate?",
        f"  override '{WRONG[1]}': train.max_steps = \"many\": wants a whole number",
    ]
    assert "Traceback" not in wrong.output


def test_accelerate_turns_a_failure_into_1_below_our_message(launched):
    assert launched["wrong"].end() == 1
    output = launched["wrong"].output
    assert "unknown key; did you mean train.learning_rate?" in output
    assert output.index("error: 2 problems:") < output.index("Traceback")
    assert "returned non-zero exit status 2" in output


def test_a_dry_run_prints_the_plan_and_builds_nothing(folder):
    dry = ForkedScript(folder / "dry.log", SCRIPT, "--config", "alone.yaml", "-d", str(folder), "--dry-run")
    assert dry.end() == 0
    output = dry.output
    assert "hidden_size: 32" in output
    assert "tokens per step: 128 = 4 samples x 32 tokens" in output
    assert "checkpoint" not in output.splitlines()[-1]


def test_alone_it_trains_and_its_last_lines_load_the_model(folder):
    alone = ForkedScript(folder / "alone.log", *job(folder, "alone"), "train.max_steps=4")
    assert alone.end() == 0, alone.output
    checkpoint = folder / "alone" / "checkpoint-4"
    assert alone.output.splitlines()[-4:] == [
        f"checkpoint: {checkpoint}",
        "load it with:",
        "    from transformers import AutoModelForCausalLM",
        f'    model = AutoModelForCausalLM.from_pretrained("{checkpoint}")',
    ]
    for written in ("README.md", "loss_curve.png", "recipe.yaml", "run.json", "model.safetensors", "tokenizer.json"):
        assert (folder / "alone" / written).stat().st_size > 0


def test_accelerate_trains_on_two_ranks(launched, folder):
    assert launched["pair"].end() == 0, launched["pair"].output
    manifest = json.loads((folder / "pair" / "checkpoint-2" / "manifest.json").read_text())
    assert manifest["metadata"]["consumed_tokens"] == 2 * 256
    assert manifest["metadata"]["data"] == 2
    assert launched["pair"].output.count("load it with:") == 1, "one voice for all ranks"


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s"
        time.sleep(0.1)
