"""Every recipe that ships loads, fits a world, and says what was published."""

from pathlib import Path

import pytest

from neox_hf.training.dry_run import dry_run_report
from neox_hf.training.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(path.name for path in RECIPES.glob("*.yaml"))


def test_the_recipes_are_there():
    expected = {"demo.yaml", "pythia_160m.yaml", "pythia_1.4b.yaml", "neox_20b.yaml", "gpt3_175b.yaml"}
    assert expected <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_loads_and_dry_runs_without_a_network(name, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    recipe = load_recipe([name], str(RECIPES))
    report = dry_run_report(recipe)
    assert "# parameters:" in report
    assert [source.path for source in recipe.data.sources] == ["stdlib"]
    assert recipe.tokenizer.kind == "trained"


# Parameters, layers, width and batch as published: EleutherAI/pythia models/*.yml, gpt-neox configs/20B.yml.
PUBLISHED = {
    "pythia_160m.yaml": ("162,322,944", "2,097,152", "299,892,736,000 in 143,000 steps", 6e-4, 6e-5, 0.1, "pythia"),
    "pythia_410m.yaml": ("405,334,016", "2,097,152", "299,892,736,000 in 143,000 steps", 3e-4, 3e-5, 0.1, "pythia"),
    "pythia_1.4b.yaml": ("1,414,647,808", "2,097,152", "299,892,736,000 in 143,000 steps", 2e-4, 2e-5, 0.1, "pythia"),
    "pythia_6.9b.yaml": (
        "6,857,302,016",
        "2,097,152",
        "299,892,736,000 in 143,000 steps",
        1.2e-4,
        1.2e-5,
        0.1,
        "pythia",
    ),
    "neox_20b.yaml": ("20,554,567,680", "3,145,728", "471,859,200,000 in 150,000 steps", 9.7e-5, 9.7e-6, 0.01, "every"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_hyper_parameters(name, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    parameters, per_step, total, rate, floor, decay, schedule = PUBLISHED[name]
    recipe = load_recipe([name], str(RECIPES))
    report = dry_run_report(recipe)
    assert f"# parameters:      {parameters} " in report
    assert f"# tokens per step: {per_step} " in report
    assert f"# tokens in total: {total}" in report
    train = recipe.train
    assert (train.learning_rate, train.min_lr, train.weight_decay, train.save_schedule) == (
        rate,
        floor,
        decay,
        schedule,
    )
    assert (train.adam_beta1, train.adam_beta2, train.adam_epsilon, train.max_grad_norm) == (0.9, 0.95, 1e-8, 1.0)
    assert (train.lr_decay_style, train.lr_warmup_fraction, recipe.data.seq_length) == ("cosine", 0.01, 2048)


# Processes of one replica, the replicas' ranks as published, the largest stage's parameters on each rank.
LAYOUTS = {
    "neox_20b.yaml": (8, "96 = 4 pipeline x 12 data x 2 tensor; 4 samples at a time, 32 times a step", "2,646,998,016"),
    "gpt3_175b.yaml": (
        96,
        "192 = 12 pipeline x 2 data x 8 tensor; 1 samples at a time, 768 times a step",
        "1,891,282,944",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_the_large_recipes(name, monkeypatch):
    smallest, world, parameters = LAYOUTS[name]
    recipe = load_recipe([name], str(RECIPES))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert f"# world:           {smallest} = " in dry_run_report(recipe)
    monkeypatch.setenv("WORLD_SIZE", world.split()[0])
    report = dry_run_report(recipe)
    assert f"# world:           {world}" in report
    assert f"{parameters} parameters on each rank" in report


def test_the_demo_is_small_enough_for_a_laptop():
    recipe = load_recipe(["demo.yaml"], str(RECIPES))
    tokens = recipe.samples_per_step(1) * recipe.data.seq_length * recipe.train.max_steps
    assert tokens <= 2_000_000
    assert recipe.train.eval_strategy == "steps"
