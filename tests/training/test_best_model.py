"""Which evaluation a recipe takes for the best one, and what it may take for one."""

import pytest

from neox_hf.errors import RecipeError
from neox_hf.training.recipe import load_recipe
from neox_hf.training.train_section import METRICS
from tests.runs import Runs

EVALUATES = ("train.eval_strategy=steps", "train.eval_steps=2")
BEST = (*EVALUATES, "train.save_strategy=best")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("best"))


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {num_hidden_layers: 2, hidden_size: 64, num_attention_heads: 4}\n"
        "tokenizer: {kind: byte}\n"
        "data: {sources: [{path: stdlib}], seq_length: 32, streams: 12}\n"
        f"train: {{max_steps: 5, per_device_train_batch_size: 2, output_dir: {tmp_path}}}\n"
    )
    return lambda *overrides: load_recipe([str(path)], overrides=overrides)


def test_the_best_has_the_lowest_loss_where_nothing_else_is_said(runs):
    assert runs.run("best", *BEST) == [0], runs.message("best")
    newest = max(int(path.name.split("-")[1]) for path in (runs.folder / "best").glob("checkpoint-*"))
    rows = [row for row in runs.log_history("best", newest) if "eval_loss" in row]
    assert min(rows, key=lambda row: row["eval_loss"])["step"] == newest
    speeds = {"runtime", "samples_per_second", "steps_per_second"}
    measured = {key.removeprefix("eval_") for key in rows[0] if key.startswith("eval_")}
    assert measured - speeds == set(METRICS)


def test_what_best_means(recipe):
    assert recipe().train.metric_for_best_model is None
    for overrides, metric, more in (
        (BEST, "loss", False),
        ((*EVALUATES, "train.load_best_model_at_end=true", "train.save_steps=4"), "loss", False),
        ((*BEST, "train.metric_for_best_model=eval_loss"), "eval_loss", False),
        ((*BEST, "train.metric_for_best_model=perplexity"), "perplexity", False),
        ((*BEST, "train.metric_for_best_model=eval_perplexity"), "eval_perplexity", False),
        ((*BEST, "train.metric_for_best_model=perplexity", "train.greater_is_better=true"), "perplexity", True),
    ):
        arguments = recipe(*overrides).training_arguments()
        assert (arguments.metric_for_best_model, arguments.greater_is_better) == (metric, more)


@pytest.mark.parametrize("metric", ["accuracy", "eval_accuracy", "runtime", "eval_eval_loss", "stdlib_loss"])
def test_what_no_evaluation_measures(recipe, metric):
    with pytest.raises(RecipeError) as error:
        recipe(*EVALUATES, f"train.metric_for_best_model={metric}")
    assert f'train.metric_for_best_model = "{metric}": is not what an evaluation measures; use loss or perplexity' in (
        str(error.value)
    )


@pytest.mark.parametrize("further", [(), ("train.eval_on_start=true",), ("train.load_best_model_at_end=true",)])
def test_without_evaluations_none_is_the_best(recipe, further):
    with pytest.raises(RecipeError) as error:
        recipe("train.save_strategy=best", *further)
    assert 'train.save_strategy = "best": saves what an evaluation finds to be the best, and there is none; set ' in (
        str(error.value)
    )


@pytest.mark.parametrize("key", ["log_level", "log_level_replica"])
def test_levels_of_the_log(recipe, key):
    for level in ("passive", "detail", "critical"):
        assert getattr(recipe(f"train.{key}={level}").train, key) == level
    with pytest.raises(RecipeError) as error:
        recipe(f"train.{key}=bogus")
    assert str(error.value) == (
        f"override 'train.{key}=bogus': train.{key} = \"bogus\": is unknown; known are critical, debug, detail, error, "
        "info, passive, warning"
    )
    with pytest.raises(RecipeError, match=r"is unknown; did you mean warning\?"):
        recipe(f"train.{key}=warn")
