"""`python -m neox_hf.tune`: what it asks of a host, and on a GPU the whole of it."""

import json
from dataclasses import dataclass

import pytest
import torch

from neox_hf import tune
from neox_hf.errors import RecipeError
from neox_hf.kernels.bias_gelu import BACKWARD_WITH_SUMS
from neox_hf.kernels.launch_choice import LaunchChoice, Question, for_every_shape, launches_on
from neox_hf.kernels.launch_file import launch_path, read_entries, read_launches
from neox_hf.tuning import Outcome, Tuning


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing has been tuned or looked up yet."""
    monkeypatch.setenv("NEOX_HF_CACHE", str(tmp_path / "cache"))
    for cached in (launches_on, read_launches):
        cached.cache_clear()
    yield tmp_path / "cache"
    for cached in (launches_on, read_launches):
        cached.cache_clear()


def error_of(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        tune.main(argv)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_without_cuda_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = error_of(["--config", "recipes/pythia_1.4b.yaml"], capsys)
    assert said.startswith("error: kernels are tuned on the CUDA device that they will run on, and torch finds none")
    assert said.count("\n") == 1


def test_a_wrong_command_line(capsys):
    said = error_of(["--config", "a.yaml", "--micro"], capsys)
    assert said.startswith("error: unrecognized arguments: --micro\nusage: python -m neox_hf.tune --config A.yaml")


def test_the_micro_batch_is_the_recipes_key(monkeypatch, capsys):
    monkeypatch.setattr(tune, "cuda_device", lambda: torch.device("cuda", 0))
    said = error_of(["--config", "recipes/pythia_1.4b.yaml", "--micro-batch", "0"], capsys)
    assert "train.per_device_train_batch_size" in said


@dataclass(frozen=True)
class Rows:
    rows: int


def found():
    choice = LaunchChoice("sum", for_every_shape(Rows(1), Rows(2)))
    question = Question(choice, torch.float32, (8,))
    return Tuning([Outcome(question, {Rows(1): 1.0, Rows(2): 0.5})], [])


def test_what_is_found_is_kept(capsys):
    tune.keep(found(), "NVIDIA H200")
    (entry,) = read_entries(launch_path("NVIDIA H200"))
    assert (entry.op, entry.launch, entry.default_ms, entry.ms) == ("sum", {"rows": 2}, 1.0, 0.5)
    assert capsys.readouterr().out == f"written: {launch_path('NVIDIA H200')}\n"


def test_a_cache_that_cannot_be_written(cache):
    cache.write_text("in the way")
    with pytest.raises(RecipeError, match=r"cannot write .*NVIDIA_H200.json: .*; set NEOX_HF_CACHE to a folder"):
        tune.keep(found(), "NVIDIA H200")


@pytest.mark.gpu
def test_a_recipe_is_tuned_and_its_launches_are_used(capsys):
    argv = ["--config", "recipes/pythia_160m.yaml", "--micro-batch", "2", "--seconds", "150"]
    assert tune.main(argv) == 0
    said = capsys.readouterr().out
    for op in ("adamw", "gradient_norm", "losses_and_gradient", "bias_gelu_backward", "row_norm_backward", "rotary"):
        assert op in said
    path = launch_path(torch.cuda.get_device_name())
    document = json.loads(path.read_text())
    assert document["device"] == torch.cuda.get_device_name()
    for item in document["launches"]:
        assert item["ms"] < 0.98 * item["default_ms"]
    launches_on.cache_clear()
    read_launches.cache_clear()
    device = torch.device("cuda", torch.cuda.current_device())
    tuned = {entry.key: entry.launch for entry in read_entries(path)}
    question = Question(BACKWARD_WITH_SUMS, torch.bfloat16, (3072,))
    expected = tuned.get(question.key, vars(question.candidates[0]))
    assert vars(BACKWARD_WITH_SUMS.chosen(device, torch.bfloat16, 3072)) == expected
