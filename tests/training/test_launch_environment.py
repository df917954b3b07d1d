"""A host's `accelerate config` does not change a run."""

from types import SimpleNamespace

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from neox_hf.errors import RecipeError
from neox_hf.training.launch_environment import COMPILER, ENGINES, WAY_OUT, check_environment
from neox_hf.training.recipe import load_recipe


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in (*ENGINES, COMPILER):
        monkeypatch.delenv(name, raising=False)


def test_no_environment_is_fine():
    check_environment(compiles=False)


@pytest.mark.parametrize("value", ["true", "True", "1"])
@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_of_the_host(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError) as error:
        check_environment(compiles=False)
    assert str(error.value) == f"{name} = {value} in the environment: {ENGINES[name]}; {WAY_OUT}"
    monkeypatch.setenv(name, "false")
    check_environment(compiles=False)


def test_a_compiler_of_the_host(monkeypatch):
    monkeypatch.setenv(COMPILER, "INDUCTOR")
    with pytest.raises(RecipeError) as error:
        check_environment(compiles=False)
    assert str(error.value) == (
        "ACCELERATE_DYNAMO_BACKEND = INDUCTOR in the environment: train.torch_compile decides what is compiled; "
        "the recipe decides a run, not the host: launch with `accelerate launch --config_file FILE` where FILE leaves "
        "it out, or with torchrun"
    )
    check_environment(compiles=True)


def test_a_plain_launch_is_fine(monkeypatch):
    """What Accelerate itself puts there for several processes."""
    arguments = launch_command_parser().parse_args(
        ["--multi_gpu", "--num_machines", "1", "--num_processes", "2", "--mixed_precision", "no", "x.py"]
    )
    arguments.dynamo_backend = "no"  # what `accelerate launch` fills in
    environment = prepare_multi_gpu_env(arguments)
    assert environment[COMPILER] == "NO"
    for name, value in environment.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    check_environment(compiles=False)


def test_it_is_refused_before_arguments_exist(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("model: pythia-14m\ntokenizer: {kind: byte}\ndata: {sources: [{path: stdlib}]}\n")
    recipe = load_recipe(["a"], str(tmp_path))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    built = SimpleNamespace(arguments=False)
    monkeypatch.setattr("neox_hf.training.recipe.NeoXTrainingArguments", lambda **_: setattr(built, "arguments", True))
    with pytest.raises(RecipeError, match=r"^ACCELERATE_USE_FSDP = true in the environment"):
        recipe.training_arguments()
    assert not built.arguments
