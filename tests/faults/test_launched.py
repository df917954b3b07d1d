"""A rank that dies while a checkpoint is written, under a real launcher: the launch ends soon, with an error, and no
process is left behind; the checkpoint before stays the one to resume from."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neox_hf.checkpoint import find_latest
from tests.runs import Runs, tiny_recipe

ROOT = Path(__file__).parents[2]
SECONDS_TO_END = 60
OVERRIDES = ("parallel.pipeline=2", "train.max_steps=6", "train.save_steps=2")

DYING = """
import os, pathlib, runpy, signal, sys
from neox_hf.checkpoint.writer import CheckpointWriter

whole = CheckpointWriter.{phase}

def die(writer, *args, **kwargs):
    if writer.step == 4 and writer.rank == {rank}:
        pathlib.Path({moment!r}).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(writer, *args, **kwargs)

CheckpointWriter.{phase} = die
runpy.run_path({script!r}, run_name="__main__")
"""


def launch(script: Path, recipe: Path, mark: str) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, str(script), "--config", str(recipe), *OVERRIDES],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
        env={**os.environ, "MARK_OF_THIS_RUN": mark},
    )


def left_behind(mark: str) -> list[int]:
    """Processes whose environment carries the mark of a run."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"MARK_OF_THIS_RUN={mark}".encode() in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.parametrize(("phase", "rank"), [("seal", 1), pytest.param("write_manifest", 0, marks=pytest.mark.slow)])
def test_a_rank_dies_while_a_checkpoint_is_written(phase, rank, tmp_path):
    runs = Runs(tmp_path)
    recipe, script, moment = tmp_path / "recipe.json", tmp_path / "dying.py", tmp_path / "moment"
    recipe.write_text(json.dumps(tiny_recipe(runs.corpus, tmp_path / "out")))
    pretrain = str(ROOT / "recipes" / "pretrain.py")
    script.write_text(DYING.format(phase=phase, rank=rank, moment=str(moment), script=pretrain))

    done = launch(script, recipe, mark=str(tmp_path))
    assert moment.exists(), done.stderr[-3000:]
    assert done.returncode != 0
    assert time.time() - moment.stat().st_mtime < SECONDS_TO_END
    assert left_behind(str(tmp_path)) == []
    assert find_latest(tmp_path / "out").path.name == "checkpoint-2"
