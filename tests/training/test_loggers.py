"""TensorBoard and W&B (offline) get every figure of the log, a NaN included."""

import json
import math
import os
import struct
from collections.abc import Iterator
from multiprocessing.util import Finalize
from pathlib import Path

import pytest

from tests.faults.test_exit_codes import spoil
from tests.runs import Runs

FIGURES = ("loss", "tokens_per_second", "tflops_per_device", "mfu", "consumed_tokens", "learning_rate", "grad_norm")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("loggers"))


def keep_here(rank: int, folder: Path) -> None:
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_CONSOLE="off")
    os.environ.update({f"WANDB_{kind}DIR": str(folder) for kind in ("", "CACHE_", "CONFIG_", "DATA_")})
    # A process of multiprocessing ends without the exit handlers in which W&B writes out its run.
    Finalize(None, finish_wandb, exitpriority=1)


def finish_wandb() -> None:
    import wandb

    wandb.finish()


def test_tensorboard_has_every_figure_and_the_nan(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ["train.report_to=[tensorboard]", "train.nan_policy=skip", "train.eval_strategy=steps"]
    nan = {"prepare": spoil, "at_steps": [3], "where": "loss"}
    assert runs.run("board", *options, "train.eval_steps=4", **nan) == [0], runs.message("board")
    (events,) = (runs.folder / "board").rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events)).Reload()
    for figure in FIGURES:
        rows = board.Scalars(f"train/{figure}")
        assert [row.step for row in rows] == list(range(1, 9)), figure
        assert all(math.isfinite(row.value) or row.step == 3 for row in rows), figure
    losses = [row.value for row in board.Scalars("train/loss")]
    assert [math.isnan(loss) for loss in losses] == [step == 3 for step in range(1, 9)]
    assert [row.value for row in board.Scalars("train/consumed_tokens")] == [128 * step for step in range(1, 9)]
    assert [row.step for row in board.Scalars("eval/loss")] == [4, 8]
    assert board.Scalars("eval/perplexity")[0].value == pytest.approx(math.exp(board.Scalars("eval/loss")[0].value))


def test_wandb_offline_has_every_figure(runs):
    options = ["train.report_to=[wandb]", "train.max_steps=2", "train.save_schedule=none"]
    assert runs.run("wandb", *options, prepare=keep_here, folder=runs.folder) == [0], runs.message("wandb")
    (file,) = (runs.folder / "wandb").rglob("*.wandb")
    rows = [row for row in history(file) if "train/loss" in row]
    assert [row["train/global_step"] for row in rows] == [1, 2]
    for figure in FIGURES:
        assert all(math.isfinite(row[f"train/{figure}"]) for row in rows), figure


def history(file: Path) -> list[dict[str, float]]:
    """What was logged, by step, of a run that was kept offline."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for content in stored_records(file.read_bytes()):
        record = Record.FromString(content)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def stored_records(content: bytes, block: int = 32768, header: int = 7) -> Iterator[bytes]:
    """The records of LevelDB's log format: parts of `checksum u32, length u16, kind u8, data`, none of which crosses
    the end of a block. Kind 1 is a whole record, 2 its first part, 3 a middle one, 4 the last."""
    place, parts = header, b""  # W&B's own header is as long as a part's
    while place + header <= len(content):
        if block - place % block < header:
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        place += header + length
        parts += content[place - length : place]
        if kind in (1, 4):
            yield parts
            parts = b""


def test_bad_rows_of_all_ranks_are_in_the_log_by_class(runs):
    corpus = runs.folder / "spotted.jsonl"
    corpus.write_text(runs.corpus.read_text() + '{"text": ""}\n{broken\n{"txet": "x"}\n{"text": ""}\n')
    options = [f"data.sources=[{{path: {corpus}}}]", "data.bad_rows=skip", "train.per_device_train_batch_size=1"]
    options += ["train.max_steps=40", "train.save_steps=40", "train.eval_strategy=steps", "train.eval_steps=40"]
    assert runs.run("spotted", *options, world_size=2) == [0, 0], runs.message("spotted")
    last = [entry for entry in runs.log_history("spotted", 40) if "bad_rows" in entry][-1]
    counts = {key: count for key, count in last.items() if key.startswith("bad_rows/")}
    # Four documents in five are trained on, and each row belongs to one rank: none is counted twice.
    assert counts["bad_rows/broken_json"] == counts["bad_rows/missing_key"] == 1
    assert counts["bad_rows/empty_text"] in (1, 2)
    assert last["bad_rows"] == sum(counts.values())
