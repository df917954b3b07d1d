"""recipes/accelerate/*.yaml start the processes of recipes that they agree with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from neox_hf.errors import RecipeError
from neox_hf.training.launch_environment import settle_environment
from neox_hf.training.recipe import load_recipe
from tests.runs import tiny_recipe, write_corpus
from tests.training.test_launch_environment import launched

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate"
LAYOUTS = {
    "ddp": ["parallel.zero_stage=0"],
    "zero1": ["parallel.zero_stage=1"],
    "zero2": ["parallel.zero_stage=2"],
    "zero3": ["parallel.zero_stage=3"],
    "3d": ["parallel.pipeline=2"],
    "cpu": ["parallel={tensor: 2, sequence: true}"],
}
"""What each is for, on two processes."""


@pytest.fixture
def recipe_file(tmp_path) -> str:
    recipe = tiny_recipe(write_corpus(tmp_path / "corpus.jsonl"), tmp_path / "run")
    recipe["train"] |= {"max_steps": 2, "save_schedule": "none"}
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe))
    return str(tmp_path / "tiny.yaml")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "MASTER_"))]:
        monkeypatch.delenv(name)


def agree(config: str, layout: list[str], recipe_file: str, monkeypatch, tmp_path) -> None:
    launched(monkeypatch, tmp_path, "--num_processes=2", config=(CONFIGS / f"{config}.yaml").read_text())
    recipe = load_recipe([recipe_file], overrides=layout)
    settle_environment(recipe._decisions(2, recipe.deepspeed_config(2)), on_cuda=True)


def test_these_are_there():
    assert {path.stem for path in CONFIGS.iterdir()} == set(LAYOUTS)


@pytest.mark.parametrize("config", LAYOUTS)
def test_it_starts_several_processes_and_decides_no_precision(config):
    values = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    assert values["distributed_type"] in ("MULTI_GPU", "DEEPSPEED")  # with any other a CPU host gets one process
    assert (values["mixed_precision"], values["num_processes"] > 1) == ("no", True)


@pytest.mark.parametrize("config", LAYOUTS)
def test_it_agrees_with_the_recipes_it_is_for(config, recipe_file, monkeypatch, tmp_path):
    agree(config, LAYOUTS[config], recipe_file, monkeypatch, tmp_path)


@pytest.mark.parametrize(("config", "other"), [("zero1", "zero2"), ("zero3", "ddp"), ("3d", "zero3"), ("zero2", "3d")])
def test_it_does_not_agree_with_others(config, other, recipe_file, monkeypatch, tmp_path):
    with pytest.raises(RecipeError, match=r"^in the environment, ACCELERATE_DEEPSPEED_ZERO_STAGE = \d, but parallel"):
        agree(config, LAYOUTS[other], recipe_file, monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("config", LAYOUTS)
def test_it_trains(config, recipe_file, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    script = ["--num_processes", "2", "recipes/pretrain.py", "--config", recipe_file, *LAYOUTS[config]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert list((tmp_path / "run").glob("model*.safetensors"))
