"""Whole runs of a tiny recipe in processes of their own, so that they can be killed, stopped and resumed.

The processes come from the preloaded fork server of `tests.gloo`, which makes a run cost a second or two.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.forked import write_to
from tests.gloo import fork_server, free_port, measured

TIMEOUT_SECONDS = 200
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dogs",
    "while",
    "seven",
    "wizards",
    "brew",
    "a",
    "strange",
    "purple",
    "potion",
    "near",
    "old",
    "mills",
]


class Runs:
    """Runs of one tiny recipe over one small corpus, below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corpus = write_corpus(folder / "corpus.jsonl")

    def start(self, name: str, *overrides: str, world_size: int = 1, prepare: Callable | None = None, **given: Any):
        """Start the ranks of a run in `folder/name`. `prepare(rank, **given)` runs in each before the job does."""
        context = fork_server()
        recipe = self.folder / f"{name}.json"
        recipe.write_text(json.dumps(tiny_recipe(self.corpus, self.folder / name)))
        port = free_port()
        ranks = [
            context.Process(target=_run_rank, args=(rank, world_size, port, recipe, overrides, prepare, given))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        return ranks

    def run(self, name: str, *overrides: str, **options: Any) -> list[int]:
        """Exit codes by rank; a signal's is negative."""
        return exit_codes(self.start(name, *overrides, **options))

    def weights(self, name: str, step: int) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / f"checkpoint-{step}" / "model.safetensors")

    def log_history(self, name: str, step: int) -> list[dict[str, float]]:
        return json.loads((self.folder / name / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]

    def losses(self, name: str, step: int = 8) -> list[float]:
        """The loss of each step that was logged up to `step`."""
        return [entry["loss"] for entry in self.log_history(name, step) if "loss" in entry]

    def message(self, name: str, rank: int = 0) -> str:
        """What a rank wrote to stdout and stderr."""
        return (self.folder / f"{name}.rank{rank}.log").read_text()


def exit_codes(ranks: list) -> list[int]:
    for process in ranks:
        process.join(TIMEOUT_SECONDS)
    alive = [process for process in ranks if process.exitcode is None]
    for process in alive:
        process.kill()
        process.join()
    assert not alive, f"{len(alive)} of {len(ranks)} ranks did not end"
    return [process.exitcode for process in ranks]


def write_corpus(path: Path, documents: int = 60) -> Path:
    generator = torch.Generator().manual_seed(0)
    with path.open("w") as file:
        for _ in range(documents):
            picks = torch.randint(len(WORDS), (40,), generator=generator).tolist()
            file.write(json.dumps({"text": " ".join(WORDS[pick] for pick in picks)}) + "\n")
    return path


def tiny_recipe(corpus: Path, output_dir: Path) -> dict[str, Any]:
    """8 steps of 4 samples of 32 tokens; a checkpoint every 2 steps."""
    return {
        "model": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "hidden_dropout": 0.1},
        "tokenizer": {"kind": "byte"},
        "data": {
            "sources": [{"path": str(corpus)}],
            "seq_length": 32,
            "streams": 4,
            "eval_fraction": 0.2,
            "eval_samples": 4,
        },
        "train": {
            "output_dir": str(output_dir),
            "max_steps": 8,
            "precision": "fp32",
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "lr_decay_style": "cosine",
            "lr_warmup_fraction": 0.25,
            "peak_tflops": 1.0,
            "logging_steps": 1,
            "save_steps": 2,
            "disable_tqdm": True,
            "resume_from_checkpoint": "latest",
        },
    }


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _run_rank(rank, world_size, port, recipe, overrides, prepare, given) -> None:
    write_to(recipe.with_suffix(f".rank{rank}.log"))
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ.update(LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    else:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several devices, one process is to choose one
    from neox_hf.training.command_line import exit_on_user_error
    from neox_hf.training.pretraining import pretrain
    from neox_hf.training.recipe import load_recipe

    if prepare is not None:
        prepare(rank, **given)
    with measured(rank), exit_on_user_error():
        code = pretrain(load_recipe([str(recipe)], None, overrides))
    sys.exit(code)
