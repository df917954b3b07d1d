"""How a run ends that cannot go on: its exit code, its message, and what it leaves behind.

Exit codes: 2 recipe, 3 data, 4 diverged, 6 checkpoint.
"""

import json
from pathlib import Path

import pytest
import torch

from neox_hf.checkpoint.lock import LOCK_FILE
from tests.runs import Runs, exit_codes

ONE = "train.per_device_train_batch_size=1"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("exits"))
    assert runs.run("whole") == [0], runs.message("whole")
    return runs


def checkpoints(runs: Runs, name: str) -> list[str]:
    return sorted(path.name for path in (runs.folder / name).glob("*checkpoint-*"))


def last_line(runs: Runs, name: str, rank: int = 0) -> str:
    return runs.message(name, rank).strip().splitlines()[-1]


# Data: 3


@pytest.fixture(scope="module")
def broken(runs) -> Path:
    """A corpus whose second row, of the second stream, is broken."""
    path = runs.folder / "broken.jsonl"
    lines = runs.corpus.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-9], *lines[2:]]) + "\n")
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_row_ends_with_code_3_and_its_place(runs, broken, workers):
    name = f"broken-{workers}"
    options = [f"data.sources=[{{path: {broken}}}]", "data.shuffle=false", f"data.workers={workers}"]
    assert runs.run(name, *options) == [3]
    assert last_line(runs, name).startswith(f"error: {broken}:2: broken_json: ")
    assert "Traceback" not in runs.message(name)


def test_a_broken_row_of_one_rank_is_told_by_that_rank_and_ends_all(runs, broken):
    options = [f"data.sources=[{{path: {broken}}}]", "data.shuffle=false", ONE]
    codes = runs.run("broken-pair", *options, world_size=2)
    assert codes[1] == 3
    assert codes[0] != 0, "its peer is gone"
    assert last_line(runs, "broken-pair", 1).startswith(f"error on rank 1: {broken}:2: broken_json: ")


def test_a_token_id_beyond_the_vocabulary_ends_with_code_3(runs):
    assert runs.run("beyond", prepare=shrink_vocabulary, rows=100) == [3]
    assert last_line(runs, "beyond").startswith("error: ")
    assert "vocab_size=100" in last_line(runs, "beyond")


def shrink_vocabulary(rank: int, rows: int) -> None:
    """Build a model with fewer rows than the tokenizer has tokens, which the recipe's own checks cannot know of."""
    from neox_hf.training import first_model

    stock = first_model.model_config

    def smaller(*args, **kwargs):
        config = stock(*args, **kwargs)
        config.vocab_size = rows
        return config

    first_model.model_config = smaller


# Divergence: 4


def spoil(
    rank: int, at_steps: list[int], where: str = "gradient", on_rank: int = 0, record: Path | None = None
) -> None:
    """Put a NaN into one gradient, or the loss, of some steps, on one rank only; with one process, note a digest of
    weights and optimizer after each step."""
    from transformers import TrainerCallback

    from neox_hf.training.engine import NativeEngine
    from neox_hf.training.trainer import NeoXTrainer

    stock, made = NativeEngine.step, NeoXTrainer.__init__

    def step(engine, model, micro_batch, num_items):
        spoilt = rank == on_rank and engine.trainer.state.global_step + 1 in at_steps
        if not spoilt:
            return stock(engine, model, micro_batch, num_items)
        weights = list(engine.trainer.model.parameters())
        if where == "loss":
            before = weights[0].detach().clone()
            with torch.no_grad():
                weights[0].fill_(float("nan"))
            loss = stock(engine, model, micro_batch, num_items)
            with torch.no_grad():
                weights[0].copy_(before)
            return loss
        hook = weights[-1].register_hook(lambda gradient: gradient * float("nan"))
        loss = stock(engine, model, micro_batch, num_items)
        hook.remove()
        return loss

    class Digests(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            inner = getattr(optimizer, "optimizer", optimizer)
            kept = [value for one in inner.state.values() for value in one.values()]
            total = [digest(tensor) for tensor in [*model.parameters(), *kept]]
            with record.open("a") as file:
                file.write(json.dumps(total) + "\n")

    def init(trainer, *args, **kwargs):
        made(trainer, *args, **kwargs)
        trainer.add_callback(Digests())

    NativeEngine.step = step
    if record is not None:
        NeoXTrainer.__init__ = init


def digest(tensor: torch.Tensor) -> str:
    import hashlib

    return hashlib.sha256(tensor.detach().float().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_nan_ends_with_code_4_and_harms_no_checkpoint(runs, where):
    name = f"nan-{where}"
    assert runs.run(name, prepare=spoil, at_steps=[4], where=where) == [4], runs.message(name)
    assert last_line(runs, name) == (
        "error: step 4: the gradient norm is nan; the last checkpoint is unharmed. Lower train.learning_rate, look at "
        "the data, or set train.nan_policy=skip"
    )
    assert "'grad_norm': 'nan'" in runs.message(name)
    assert ("'loss': 'nan'" in runs.message(name)) == (where == "loss")
    assert checkpoints(runs, name) == ["checkpoint-2"]
    assert runs.run(name) == [0], runs.message(name)
    assert_same(runs.weights("whole", 8), runs.weights(name, 8))


def test_a_nan_at_the_last_step_is_not_overlooked(runs):
    assert runs.run("nan-last", "train.save_schedule=none", prepare=spoil, at_steps=[8]) == [4]
    assert "step 8: the gradient norm is nan" in last_line(runs, "nan-last")
    assert not (runs.folder / "nan-last" / "model.safetensors").exists()


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_skipped_step_changes_no_bit(runs, precision):
    name, record = f"skip-{precision}", runs.folder / f"skip-{precision}.digests"
    options = ["train.nan_policy=skip", f"train.precision={precision}"]
    assert runs.run(name, *options, prepare=spoil, at_steps=[3, 4, 6], where="loss", record=record) == [0]
    digests = [json.loads(line) for line in record.read_text().splitlines()]
    unchanged = [step for step in range(2, 9) if digests[step - 1] == digests[step - 2]]
    assert unchanged == [3, 4, 6]
    log = [row for row in runs.log_history(name, 8) if "loss" in row]
    assert [row.get("skipped_steps", 0) for row in log] == [0, 0, 1, 2, 2, 3, 3, 3]
    assert [row["step"] for row in log if row["loss"] != row["loss"]] == [3, 4, 6], "only those steps log a NaN"
    assert all(tensor.isfinite().all() for tensor in runs.weights(name, 8).values())


def test_too_many_skipped_steps_in_a_row_end_with_code_4(runs):
    options = ["train.nan_policy=skip", "train.max_skipped_steps=2"]
    assert runs.run("skips", *options, prepare=spoil, at_steps=[2, 4, 5]) == [4]
    message = last_line(runs, "skips")
    assert message.startswith("error: step 5: the gradient norm is nan, which makes 2 in a row (train.max_sk")
    assert checkpoints(runs, "skips") == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize(("policy", "codes"), [("raise", [4, 4]), ("skip", [0, 0])])
def test_a_nan_on_one_rank_is_met_by_all(runs, policy, codes):
    name = f"pair-{policy}"
    options = [ONE, f"train.nan_policy={policy}"]
    assert runs.run(name, *options, world_size=2, prepare=spoil, at_steps=[4], on_rank=1) == codes, runs.message(name)
    if policy == "raise":
        assert "error: step 4: the gradient norm is nan" in runs.message(name, 0)
        assert "error" not in runs.message(name, 1).replace("error_", ""), "one voice for all"
        assert checkpoints(runs, name) == ["checkpoint-2"]
    else:
        assert [row["skipped_steps"] for row in runs.log_history(name, 8) if "skipped_steps" in row] == [1] * 5


# Recipe: 2


def test_an_optimizer_without_master_weights_ends_with_code_2(runs):
    assert runs.run("sgd", "train.precision=bf16", "train.optim=sgd") == [2]
    assert last_line(runs, "sgd").startswith(
        "error: override 'train.optim=sgd': train.optim = \"sgd\": keeps no fp32 master weights"
    )
    assert checkpoints(runs, "sgd") == []


# Checkpoints and the output directory: 6


def test_a_named_checkpoint_that_is_missing_ends_with_code_6(runs):
    missing = runs.folder / "nowhere" / "checkpoint-4"
    assert runs.run("missing", f"train.resume_from_checkpoint={missing}", ONE, world_size=2) == [6, 6]
    expected = f"error: {missing}/manifest.json is missing: {missing} is not a finished checkpoint"
    assert last_line(runs, "missing") == expected
    assert "error" not in runs.message("missing", rank=1)  # one voice is enough for what all ranks agreed on


def test_an_output_directory_with_checkpoints_is_not_overwritten(runs):
    before = contents(runs.folder / "whole")
    assert runs.run("whole", "train.resume_from_checkpoint=null") == [6]
    assert last_line(runs, "whole") == (
        f"error: {runs.folder}/whole already holds checkpoint-8; continue it with "
        "train.resume_from_checkpoint=latest, or choose another train.output_dir"
    )
    assert contents(runs.folder / "whole") == before


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, which names its last holder."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_second_trainer_on_one_directory_is_refused(runs):
    gate = runs.folder / "gate"
    first = runs.start("shared", prepare=wait_in_step, at_step=3, gate=gate)
    wait_for(gate.with_suffix(".reached"))
    second = runs.folder / "second.json"
    recipe = json.loads((runs.folder / "shared.json").read_text())
    second.write_text(json.dumps(recipe))
    assert runs.run("second", f"train.output_dir={runs.folder}/shared") == [6]
    assert f"{runs.folder}/shared is in use by another trainer, pid {first[0].pid} on " in last_line(runs, "second")
    gate.touch()
    assert exit_codes(first) == [0], runs.message("shared")
    assert_same(runs.weights("whole", 8), runs.weights("shared", 8))


def wait_in_step(rank: int, at_step: int, gate: Path) -> None:
    from neox_hf.training.engine import NativeEngine

    stock = NativeEngine.step

    def step(engine, model, micro_batch, num_items):
        if engine.trainer.state.global_step == at_step:
            gate.with_suffix(".reached").touch()
            wait_for(gate)
        return stock(engine, model, micro_batch, num_items)

    NativeEngine.step = step


def wait_for(path: Path, seconds: float = 60) -> None:
    import time

    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_a_finished_run_started_again_trains_no_further(runs):
    before = runs.weights("whole", 8)
    assert runs.run("whole") == [0], runs.message("whole")
    assert "nothing is left to train: step 8 of 8 is done" in runs.message("whole")
    assert checkpoints(runs, "whole") == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    assert_same(before, runs.weights("whole", 8))


def test_a_run_that_holds_nothing_out_needs_no_evaluation_set(runs):
    assert runs.run("all", "data.eval_fraction=0", "data.eval_samples=3") == [0], runs.message("all")
