"""Flags of `accelerate launch` and a host's `accelerate config` agree with the recipe, or the run does not start."""

import json
import os
from types import SimpleNamespace

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from neox_hf.errors import RecipeError, TopologyError
from neox_hf.training import launch_environment as environment
from neox_hf.training.launch_environment import WAY_OUT, Decisions, check_one_process_was_meant, settle_environment
from neox_hf.training.recipe import Recipe, load_recipe
from tests.gloo import run_ranks

RECIPE = """
model: pythia-14m
tokenizer: {kind: byte}
data: {sources: [{path: stdlib}]}
parallel: {zero_stage: 2, offload: optimizer}
train: {precision: bf16, gradient_accumulation_steps: 4, max_grad_norm: 0.5, per_device_train_batch_size: 2}
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    (tmp_path / "a.yaml").write_text(RECIPE)
    return load_recipe(["a"], str(tmp_path))


def decided(recipe: Recipe) -> Decisions:
    return recipe._decisions(1, recipe.deepspeed_config(1))


PLAIN = Decisions(
    compiles=False,
    precision="fp32",
    zero_stages=(0, 0),
    offload="none",
    accumulation=1,
    max_grad_norm=1.0,
    samples=8,
    deepspeed=None,
)


def launched(monkeypatch, tmp_path, *flags: str, config: str | None = None) -> None:
    """Set the variables that this `accelerate launch` would have set."""
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", str(tmp_path / "none.yaml"))
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
        flags = (*flags, "--config_file", str(tmp_path / "config.yaml"))
    args = launch_command_parser().parse_args([*flags, "train.py"])
    args, defaults, precision_from_file = _validate_launch_command(args)
    if args.use_deepspeed:
        fields = list(defaults.deepspeed_config) if defaults else []
        args.deepspeed_fields_from_accelerate_config = ",".join([*fields, *["mixed_precision"] * precision_from_file])
        _, variables = prepare_deepspeed_cmd_env(args)
    elif args.multi_gpu:
        variables = prepare_multi_gpu_env(args)
    else:
        _, variables = prepare_simple_launcher_cmd_env(args)
    for name, value in variables.items():
        if name.startswith("ACCELERATE_") or name.startswith("MASTER_"):
            monkeypatch.setenv(name, value)


def refusal(decisions: Decisions, on_cuda: bool = False) -> str:
    before = dict(os.environ)
    with pytest.raises(RecipeError) as error:
        settle_environment(decisions, on_cuda)
    assert dict(os.environ) == before
    return str(error.value)


def test_no_environment_is_fine(recipe):
    settle_environment(PLAIN, on_cuda=False)
    settle_environment(decided(recipe), on_cuda=True)


@pytest.mark.parametrize("value", ["true", "True", "1"])
@pytest.mark.parametrize("name", environment.ENGINES)
def test_an_engine_that_no_recipe_has(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert refusal(PLAIN) == f"in the environment, {name} = {value}: {environment.ENGINES[name]}; {WAY_OUT}"
    monkeypatch.setenv(name, "false")
    settle_environment(PLAIN, on_cuda=False)


def test_a_compiler_of_the_host(monkeypatch):
    monkeypatch.setenv(environment.COMPILER, "INDUCTOR")
    assert refusal(PLAIN) == (
        "in the environment, ACCELERATE_DYNAMO_BACKEND = INDUCTOR: train.torch_compile decides what is compiled; the "
        "recipe decides a run, not the host: change the recipe, or leave this out of the flags of `accelerate launch` "
        "and of the file that `accelerate config` wrote (`--config_file FILE` takes another), or launch with torchrun"
    )
    settle_environment(Decisions(**{**vars(PLAIN), "compiles": True}), on_cuda=False)


@pytest.mark.parametrize(
    "flags", [[], ["--num_processes", "2", "--multi_gpu"], ["--num_processes", "2", "--use_deepspeed"]]
)
@pytest.mark.parametrize("on_cuda", [False, True])
def test_what_accelerate_writes_by_itself_says_nothing(recipe, flags, on_cuda, monkeypatch, tmp_path):
    """`--use_deepspeed` alone starts processes; the recipe says what DeepSpeed does, if anything."""
    for decisions in (PLAIN, decided(recipe)):
        launched(monkeypatch, tmp_path, *flags)
        settle_environment(decisions, on_cuda)
        left = [name for name in os.environ if name.startswith("ACCELERATE_") and "DYNAMO" not in name]
        # The precision is what `training/signals.py` knows the launcher by.
        assert left == ["ACCELERATE_MIXED_PRECISION"]


AGREEING = [
    "--use_deepspeed",
    "--num_processes=2",
    "--zero_stage=2",
    "--offload_optimizer_device=cpu",
    "--offload_param_device=none",
    "--gradient_accumulation_steps=4",
    "--gradient_clipping=0.5",
    "--mixed_precision=bf16",
]


def test_flags_that_agree(recipe, monkeypatch, tmp_path):
    launched(monkeypatch, tmp_path, *AGREEING)
    settle_environment(decided(recipe), on_cuda=True)
    assert not [name for name in os.environ if name.startswith("ACCELERATE_DEEPSPEED")]


CONTRADICTIONS = [
    ("--zero_stage=3", "ACCELERATE_DEEPSPEED_ZERO_STAGE = 3, but parallel.zero_stage = 2"),
    ("--offload_optimizer_device=nvme", "OPTIMIZER_DEVICE = nvme, but parallel.offload = optimizer"),
    ("--offload_param_device=cpu", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE = cpu, but weights stay on the device; "),
    (
        "--gradient_accumulation_steps=2",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS = 2, but a step of this recipe takes 4",
    ),
    ("--gradient_clipping=1.0", "ACCELERATE_GRADIENT_CLIPPING = 1.0, but train.max_grad_norm = 0.5"),
    ("--mixed_precision=fp16", "ACCELERATE_MIXED_PRECISION = fp16, but train.precision = bf16"),
]


@pytest.mark.parametrize(("flag", "message"), CONTRADICTIONS, ids=[flag for flag, _ in CONTRADICTIONS])
def test_flags_that_contradict(recipe, flag, message, monkeypatch, tmp_path):
    launched(monkeypatch, tmp_path, *AGREEING, flag)
    text = refusal(decided(recipe), on_cuda=True)
    assert message in text
    assert text.endswith(WAY_OUT)


def test_all_contradictions_are_told_at_once(recipe, monkeypatch, tmp_path):
    launched(monkeypatch, tmp_path, "--use_deepspeed", "--num_processes=2", *[flag for flag, _ in CONTRADICTIONS])
    lines = refusal(decided(recipe)).splitlines()
    assert (lines[0], len(lines)) == ("in the environment,", 2 + len(CONTRADICTIONS))


def test_a_value_that_is_no_number(recipe, monkeypatch):
    monkeypatch.setenv(environment.ZERO_STAGE, "two")
    assert "ACCELERATE_DEEPSPEED_ZERO_STAGE = two, but parallel.zero_stage = 2" in refusal(decided(recipe))


def test_a_file_of_accelerate_config(recipe, monkeypatch, tmp_path):
    """Its wizard writes accumulation 1 and no offloading where nobody chose anything."""
    config = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {gradient_accumulation_steps: 1, offload_param_device: none, zero3_init_flag: true, zero_stage: 2}
mixed_precision: bf16
num_machines: 1
num_processes: 2
"""
    launched(monkeypatch, tmp_path, config=config)
    assert os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "1"
    settle_environment(decided(recipe), on_cuda=True)
    launched(monkeypatch, tmp_path, config=config.replace("zero_stage: 2", "zero_stage: 3"))
    assert "ZERO_STAGE = 3, but parallel.zero_stage = 2" in refusal(decided(recipe))


def test_a_split_model_has_two_right_stages(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text(RECIPE.replace("zero_stage: 2, offload: optimizer", "pipeline: 2"))
    recipe = load_recipe(["a"], str(tmp_path))
    decisions = recipe._decisions(2, recipe.deepspeed_config(2))
    for stage in ("0", "1"):
        monkeypatch.setenv(environment.ZERO_STAGE, stage)
        settle_environment(decisions, on_cuda=False)
    monkeypatch.setenv(environment.ZERO_STAGE, "2")
    assert "ZERO_STAGE = 2, but parallel.zero_stage = 0, which runs as 1" in refusal(decisions)


def test_the_cpu_flag_on_a_host_with_a_gpu(monkeypatch, tmp_path):
    launched(monkeypatch, tmp_path, "--cpu")
    assert "ACCELERATE_USE_CPU = True, but there is a CUDA device; to train on" in refusal(PLAIN, on_cuda=True)
    settle_environment(PLAIN, on_cuda=False)
    assert environment.CPU not in os.environ  # Accelerate would forget DeepSpeed over it


def config_file(monkeypatch, tmp_path, values: dict) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(values))
    launched(monkeypatch, tmp_path, "--use_deepspeed", "--num_processes=2", "--deepspeed_config_file", str(path))


def test_a_configuration_file_of_deepspeed_that_agrees(recipe, monkeypatch, tmp_path):
    own = recipe.deepspeed_config(1)
    said = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "cpu_offload": False},
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale": 0},
        "train_batch_size": 8,
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    }
    for values in (own, said, {}):
        config_file(monkeypatch, tmp_path, values)
        settle_environment(decided(recipe), on_cuda=False)


def test_a_configuration_file_of_deepspeed_that_differs(recipe, monkeypatch, tmp_path):
    config_file(
        monkeypatch,
        tmp_path,
        {
            "zero_optimization": {"stage": 3},
            "optimizer": {"type": "Adam", "params": {"lr": "auto"}},
            "fp16": {"enabled": True},
            "train_batch_size": 16,
        },
    )
    text = refusal(decided(recipe))
    for difference in (
        "zero_optimization.stage = 3 and the recipe comes to 2",
        'optimizer.type = "Adam" has no place in a recipe',
        "fp16.enabled = true has no place in a recipe",
        "train_batch_size = 16 and the recipe comes to 8",
    ):
        assert difference in text


def test_a_configuration_file_where_deepspeed_has_no_part(monkeypatch, tmp_path):
    config_file(monkeypatch, tmp_path, {"zero_optimization": {"stage": 2}})
    assert "ds.json, but parallel.zero_stage = 0 trains without DeepSpeed" in refusal(PLAIN)


def test_a_configuration_file_that_cannot_be_read(recipe, monkeypatch, tmp_path):
    monkeypatch.setenv(environment.CONFIG_FILE, str(tmp_path / "gone.json"))
    assert "gone.json, which cannot be read: [Errno 2]" in refusal(decided(recipe))


def test_one_process_where_several_were_meant(monkeypatch, tmp_path):
    launched(monkeypatch, tmp_path, "--num_processes", "4")
    with pytest.raises(TopologyError) as error:
        check_one_process_was_meant(on_cuda=False, needed=4)
    assert str(error.value) == (
        "accelerate was asked for several processes and started one, as it does on a host without GPUs; launch with "
        "`accelerate launch --multi_gpu --num_processes 4 recipes/pretrain.py --config ...`, or, where one process is "
        "meant, without --num_processes and with MASTER_ADDR unset"
    )
    check_one_process_was_meant(on_cuda=True, needed=4)
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_one_process_was_meant(on_cuda=False, needed=4)


@pytest.mark.parametrize("flags", [[], ["--num_processes", "1"]])
def test_one_process_that_was_meant(flags, monkeypatch, tmp_path):
    launched(monkeypatch, tmp_path, *flags)
    check_one_process_was_meant(on_cuda=False, needed=1)


def test_it_is_refused_before_arguments_exist(recipe, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    built = SimpleNamespace(arguments=False)
    monkeypatch.setattr("neox_hf.training.recipe.NeoXTrainingArguments", lambda **_: setattr(built, "arguments", True))
    with pytest.raises(RecipeError, match=r"^in the environment, ACCELERATE_USE_FSDP = true: "):
        recipe.training_arguments()
    assert not built.arguments


def test_a_chosen_device_of_deepspeed_stays(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "chosen")
    environment.prepare_deepspeed_on_cpu()
    assert os.environ["DS_ACCELERATOR"] == "chosen"


def rank_with_deepspeed(rank: int) -> bool:
    import deepspeed.comm

    environment.do_without_compiled_reduction()
    deepspeed.init_distributed("gloo")
    return deepspeed.comm.comm.cdb.shm_comm_op is None


def test_deepspeed_compiles_nothing_on_a_cpu():
    assert run_ranks(rank_with_deepspeed, 1) == [True]
