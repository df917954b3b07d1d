"""What a run resumes from: the newest checkpoint that is whole, of this very run, under any number of ranks."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from neox_hf.checkpoint.lock import LOCK_FILE
from tests.runs import Runs

PLAIN = ["model.hidden_dropout=0", "train.gradient_accumulation_steps=1", "train.global_batch_size=4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("damaged"))
    assert runs.run("whole") == [0], runs.message("whole")
    return runs


def halfway(runs: Runs, source: str, name: str, *kept: int) -> Path:
    """A run's folder with only the checkpoints of the steps `kept`."""
    import shutil

    for step in kept:
        shutil.copytree(runs.folder / source / f"checkpoint-{step}", runs.folder / name / f"checkpoint-{step}")
    return runs.folder / name


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize("kind", ["model.safetensors", "state/optimizer.exp_avg-*.safetensors", "state/data.json"])
def test_a_flipped_byte_is_named_and_never_loaded(runs, kind):
    name = "flipped-" + Path(kind).stem.strip("-*")
    folder = halfway(runs, "whole", name, 2, 4)
    damaged = next((folder / "checkpoint-4").glob(kind))
    flip_byte(damaged)
    assert runs.run(name) == [0], runs.message(name)
    assert f"{damaged} is damaged: its sha256 is " in runs.message(name)
    assert f"resuming from {folder}/checkpoint-2" in runs.message(name)
    assert_same(runs.weights("whole", 8), runs.weights(name, 8))


def test_a_damaged_checkpoint_named_by_the_user_is_refused(runs):
    folder = halfway(runs, "whole", "named", 2, 4)
    flip_byte(folder / "checkpoint-4" / "model.safetensors")
    before = contents(folder)
    assert runs.run("named", f"train.resume_from_checkpoint={folder}/checkpoint-4") == [6]
    message = runs.message("named").strip().splitlines()[-1]
    assert message.startswith(f"error: {folder}/checkpoint-4/model.safetensors is damaged: its sha256 is ")
    assert message.endswith("; resume from another checkpoint")
    assert contents(folder) == before


def test_a_run_with_no_valid_checkpoint_starts_afresh_and_says_so(runs):
    folder = halfway(runs, "whole", "none-left", 2)
    (folder / "checkpoint-2" / "manifest.json").unlink()
    assert runs.run("none-left") == [0], runs.message("none-left")
    assert f"{folder}/checkpoint-2/manifest.json is missing" in runs.message("none-left")
    assert f"no valid checkpoint in {folder}: starting from the beginning" in runs.message("none-left")
    assert_same(runs.weights("whole", 8), runs.weights("none-left", 8))


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file but the lock, which names its last holder."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("tokenizer={kind: pretrained, path: TOKENIZER}", "tokenizer: "),
        ("data.sources=[{path: OTHER}]", "sources.0"),
        ("data.seq_length=16", "seq_length: 32 in the state, 16 in this run"),
        ("data.seed=7", "seed: 1234 in the state, 7 in this run"),
    ],
)
def test_another_token_sequence_is_refused_before_anything_changes(runs, override, difference):
    from neox_hf.data.tokenization import byte_tokenizer
    from tests.runs import write_corpus

    name = "other-" + difference.split(":")[0].split(".")[0]
    folder = halfway(runs, "whole", name, 2)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["the"])
    tokenizer.save_pretrained(runs.folder / "tokenizer")
    other = write_corpus(runs.folder / "other.jsonl", documents=50)
    override = override.replace("TOKENIZER", str(runs.folder / "tokenizer")).replace("OTHER", str(other))
    before = contents(folder)
    # The model keeps its shape, so that the stream alone differs.
    assert runs.run(name, override, "model.max_position_embeddings=32") == [3], runs.message(name)
    message = runs.message(name).strip().splitlines()[-1]
    assert message.startswith(
        "error: the data state belongs to another token sequence; restore what it was made with, or start a new run. "
    )
    assert difference in message
    assert contents(folder) == before


def test_a_model_of_another_shape_is_refused(runs):
    folder = halfway(runs, "whole", "wider", 2)
    before = contents(folder)
    assert runs.run("wider", "model.hidden_size=64") == [6], runs.message("wider")
    assert runs.message("wider").strip().splitlines()[-1] == (
        "error: gpt_neox.embed_in.weight has shape (384, 32) in model.safetensors and (384, 64) in the model; use the "
        "model section of the recipe that wrote it"
    )
    assert contents(folder) == before


# Other layouts


def tokens(*paths: Path) -> dict[int, set[str]]:
    """The samples' digests of each step, over all ranks."""
    by_step: dict[int, set[str]] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            step, samples = json.loads(line)
            by_step.setdefault(step, set()).update(samples)
    return by_step


def record_samples(rank: int, stem: Path) -> None:
    """Append the step and the digests of the samples of each micro-batch."""
    from neox_hf.training.engine import NativeEngine

    stock = NativeEngine.step

    def step(engine, model, micro_batch, num_items):
        samples = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in micro_batch["input_ids"]]
        with stem.with_suffix(f".{rank}").open("a") as file:
            file.write(json.dumps([engine.trainer.state.global_step, samples]) + "\n")
        return stock(engine, model, micro_batch, num_items)

    NativeEngine.step = step


@pytest.fixture(scope="module")
def one_rank(runs) -> Runs:
    assert runs.run("one", *PLAIN, prepare=record_samples, stem=runs.folder / "one") == [0], runs.message("one")
    return runs


@pytest.fixture(scope="module")
def two_ranks(one_rank) -> Runs:
    given = {"prepare": record_samples, "stem": one_rank.folder / "two"}
    assert one_rank.run("two", *PLAIN, world_size=2, **given) == [0, 0], one_rank.message("two", 1)
    return one_rank


def test_one_and_two_ranks_follow_one_curve_over_one_sequence(two_ranks):
    runs = two_ranks
    assert runs.losses("two") == pytest.approx(runs.losses("one"), rel=1e-5)
    assert tokens(runs.folder / "two.0", runs.folder / "two.1") == tokens(runs.folder / "one.0")


@pytest.mark.parametrize(("source", "world_size"), [("one", 2), ("two", 1)])
def test_resumed_on_another_number_of_ranks(two_ranks, source, world_size):
    runs, name = two_ranks, f"{source}-to-{world_size}"
    halfway(runs, source, name, 4)
    given = {"prepare": record_samples, "stem": runs.folder / name}
    assert runs.run(name, *PLAIN, world_size=world_size, **given) == [0] * world_size, runs.message(name)
    assert f"resuming from {runs.folder}/{name}/checkpoint-4" in runs.message(name)
    assert runs.losses(name) == pytest.approx(runs.losses("one"), rel=1e-5)
    seen = tokens(*(runs.folder / f"{name}.{rank}" for rank in range(world_size)))
    assert seen == {step: samples for step, samples in tokens(runs.folder / "one.0").items() if step >= 4}


def test_resumed_with_loader_workers(one_rank):
    runs = one_rank
    halfway(runs, "one", "workers", 4)
    given = {"prepare": record_samples, "stem": runs.folder / "workers"}
    assert runs.run("workers", *PLAIN, "data.workers=2", **given) == [0], runs.message("workers")
    seen = tokens(runs.folder / "workers.0")
    assert seen == {step: samples for step, samples in tokens(runs.folder / "one.0").items() if step >= 4}
    assert_same(runs.weights("one", 8), runs.weights("workers", 8))


def test_a_resumed_log_is_the_whole_log(one_rank):
    """Everything but clocks and memory is what the uninterrupted run logged."""
    runs = one_rank
    halfway(runs, "one", "log", 4)
    assert runs.run("log", *PLAIN) == [0], runs.message("log")
    kept = ("step", "epoch", "loss", "grad_norm", "learning_rate", "consumed_tokens")
    whole, resumed = (
        [{key: row[key] for key in kept} for row in runs.log_history(name, 8) if "loss" in row]
        for name in ("one", "log")
    )
    assert resumed == whole
    assert [row["epoch"] for row in whole] == [step / 8 for step in range(1, 9)]
    final = json.loads((runs.folder / "log" / "trainer_state.json").read_text())["log_history"]
    assert final[:8] == runs.log_history("log", 8)
    assert "train_runtime" in final[-1]
