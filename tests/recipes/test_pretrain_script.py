"""`recipes/pretrain.py` as a user runs it: alone and under both launchers, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import tiny_recipe, write_corpus

ROOT = Path(__file__).parents[2]
SCRIPT = "recipes/pretrain.py"
ACCELERATE = ["-m", "accelerate.commands.launch"]
PLAIN = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
ONE_ON_CPU = ["--cpu", "--num_processes", "1", *PLAIN]
TWO_ON_CPU = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0", *PLAIN]
WRONG = ["train.learning_rat=3e-4", "train.max_steps=many"]
TIMEOUT_SECONDS = 240


class Command:
    """A process of ours: its output goes to a file, so that it never waits for a reader."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
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
def commands(folder) -> Iterator[dict[str, Command]]:
    """All of them at once: most of their time is spent on imports."""
    one, two = [*ACCELERATE, *ONE_ON_CPU], [*ACCELERATE, *TWO_ON_CPU]
    of = {name: ["--config", str(folder / f"{name}.yaml")] for name in ("alone", "pair", "stopped")}
    started = {
        "wrong": Command(folder / "wrong.log", SCRIPT, *of["alone"], *WRONG),
        "launched wrong": Command(folder / "launched-wrong.log", *one, SCRIPT, *of["alone"], *WRONG),
        "dry": Command(folder / "dry.log", SCRIPT, "--config", "alone.yaml", "-d", str(folder), "--dry-run"),
        "alone": Command(folder / "alone.log", SCRIPT, *of["alone"], "train.max_steps=4"),
        "pair": Command(folder / "pair.log", *two, SCRIPT, *of["pair"], "train.max_steps=2"),
        "stopped": Command(
            folder / "stopped.log", *one, SCRIPT, *of["stopped"], "train.max_steps=10000", "train.save_steps=10000"
        ),
    }
    yield started
    for command in started.values():
        command.kill()


def test_a_stopped_launcher_leaves_a_checkpoint_within_30_seconds(commands, folder):
    """First of all tests: until it is stopped, it trains on, and takes time from the others."""
    command, output_dir = commands["stopped"], folder / "stopped"
    wait_until(lambda: "'loss': " in command.output or command.process.poll() is not None, TIMEOUT_SECONDS)
    command.process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    wait_until(lambda: any(output_dir.glob("checkpoint-*")), 30)
    wait_until(lambda: "stopped by signal 15 after saving step" in command.output, 30 - (time.monotonic() - begin))
    assert command.end() != 0


def test_a_wrong_recipe_ends_with_code_2_and_no_traceback(commands, folder):
    assert commands["wrong"].end() == 2
    lines = commands["wrong"].output.splitlines()
    start = lines.index("error: 2 problems:")
    assert lines[start + 1 :] == [
        f"  override '{WRONG[0]}': train.learning_rat = 0.0003: unknown key; did you mean train.learning_rate?",
        f"  override '{WRONG[1]}': train.max_steps = \"many\": wants a whole number",
    ]
    assert "Traceback" not in commands["wrong"].output


def test_accelerate_turns_a_failure_into_1_below_our_message(commands):
    assert commands["launched wrong"].end() == 1
    output = commands["launched wrong"].output
    assert "unknown key; did you mean train.learning_rate?" in output
    assert output.index("error: 2 problems:") < output.index("Traceback")
    assert "returned non-zero exit status 2" in output


def test_a_dry_run_prints_the_plan_and_builds_nothing(commands):
    assert commands["dry"].end() == 0
    output = commands["dry"].output
    assert "hidden_size: 32" in output
    assert "tokens per step: 128 = 4 samples x 32 tokens" in output
    assert "checkpoint" not in output.splitlines()[-1]


def test_alone_it_trains_and_its_last_lines_load_the_model(commands, folder):
    assert commands["alone"].end() == 0, commands["alone"].output
    checkpoint = folder / "alone" / "checkpoint-4"
    assert commands["alone"].output.splitlines()[-4:] == [
        f"checkpoint: {checkpoint}",
        "load it with:",
        "    from transformers import AutoModelForCausalLM",
        f'    model = AutoModelForCausalLM.from_pretrained("{checkpoint}")',
    ]
    for written in ("README.md", "loss_curve.png", "recipe.yaml", "run.json", "model.safetensors", "tokenizer.json"):
        assert (folder / "alone" / written).stat().st_size > 0


def test_accelerate_trains_on_two_ranks(commands, folder):
    assert commands["pair"].end() == 0, commands["pair"].output
    manifest = json.loads((folder / "pair" / "checkpoint-2" / "manifest.json").read_text())
    assert manifest["metadata"]["consumed_tokens"] == 2 * 256
    assert manifest["metadata"]["data"] == 2
    assert commands["pair"].output.count("load it with:") == 1, "one voice for all ranks"


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s"
        time.sleep(0.1)
