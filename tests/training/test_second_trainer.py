"""A second `NeoXTrainer` of the same model, in whose parameters the first one's run has left its hooks and sums."""

import json

import pytest
import torch

from neox_hf.training.pretraining import build_trainer
from neox_hf.training.recipe import Recipe, load_recipe
from neox_hf.training.trainer import NeoXTrainer
from tests.gloo import run_ranks
from tests.runs import tiny_recipe, write_corpus

LAYOUTS = {
    "replicas": {},
    "zero 1": {"zero_stage": 1},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
}


def fresh(recipe: Recipe, rank: int, connected: list) -> NeoXTrainer:
    args = recipe.training_arguments()
    if not connected:
        connected.append(recipe.topology(args.world_size, args.process_index).connect())
    return build_trainer(recipe, args, connected[0])


def told(trainer: NeoXTrainer) -> list[tuple[float, float]]:
    trainer.train()
    trainer.loader.close()
    return [(entry["loss"], float(entry["grad_norm"])) for entry in trainer.state.log_history if "loss" in entry]


def two_trainers(rank: int, path: str) -> list[list[tuple[float, float]]]:
    """What each tells of its steps. The second one begins with the weights and the samples of the first."""
    recipe, connected = load_recipe([path]), []
    first = fresh(recipe, rank, connected)
    held = [parameter for parameter in first.model.parameters() if not parameter.is_meta]
    start = [parameter.detach().clone() for parameter in held]
    found = [told(first)]
    for parameter, value in zip(held, start, strict=True):
        parameter.data.copy_(value)
    samples = fresh(recipe, rank, connected).train_dataset
    args = recipe.training_arguments()
    others = {"topology": connected[0], "train_dataset": samples, "processing_class": first.processing_class}
    return [*found, told(NeoXTrainer(first.model, args, **others))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_trains_as_the_first_did(tmp_path, layout):
    recipe = tiny_recipe(write_corpus(tmp_path / "corpus.jsonl"), tmp_path / "out")
    recipe["parallel"] = LAYOUTS[layout]
    recipe["model"]["hidden_dropout"] = 0.0
    recipe["train"] |= {"precision": "bf16", "max_steps": 3, "save_schedule": "none", "resume_from_checkpoint": None}
    if layout in ("tensor", "pipeline"):
        recipe["train"]["gradient_accumulation_steps"] = 4
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    for first, second in run_ranks(two_trainers, 2, str(tmp_path / "recipe.json")):
        assert torch.tensor(second).sub(torch.tensor(first)).abs().max() < 1e-3
