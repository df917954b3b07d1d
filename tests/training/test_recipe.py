"""A recipe from files and overrides: what is read, what follows from the world, and what is handed to HF."""

import pickle

import pytest

from neox_hf.config import dump_yaml
from neox_hf.errors import RecipeError, TopologyError
from neox_hf.parallel.settings import ParallelSettings
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.recipe import Recipe, check_world, load_recipe
from neox_hf.training.train_section import REFUSED

SMALL = """
model: {num_hidden_layers: 2, hidden_size: 64, num_attention_heads: 4}
tokenizer: {kind: byte}
data: {sources: [{path: stdlib}], seq_length: 32, streams: 12}
train: {max_steps: 5, per_device_train_batch_size: 2}
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return str(path)


def test_files_and_overrides_merge_left_to_right(small, tmp_path):
    (tmp_path / "more.yaml").write_text("train: {max_steps: 7, learning_rate: 1e-4}\nhub:\n")
    recipe = load_recipe(["small", "more.yaml"], str(tmp_path), ["train.max_steps=9", "model.hidden_act=gelu_fast"])
    assert recipe.train.max_steps == 9
    assert recipe.train.learning_rate == 1e-4
    assert recipe.model.hidden_size == 64
    assert recipe.model.hidden_act == "gelu_fast"
    assert recipe.data.sources[0].path == "stdlib"


def test_a_name_alone_is_a_model(small):
    recipe = load_recipe([small], overrides=["model=pythia-14m", "model.hidden_dropout=0.1"])
    assert recipe.model.config_fields() == {"hidden_dropout": 0.1}
    assert recipe.model.name == "pythia-14m"


def test_a_recipe_is_a_value(small):
    recipe = load_recipe([small])
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    with pytest.raises(AttributeError):
        recipe.train.max_steps = 3


def test_the_resolved_recipe_says_the_same(small, tmp_path):
    recipe = load_recipe([small], overrides=["train.save_schedule=[1, 3]", "data.eval_sources=[{path: /x/*.jsonl}]"])
    (tmp_path / "resolved.yaml").write_text(dump_yaml(recipe.resolved()))
    assert load_recipe(["resolved.yaml"], str(tmp_path)) == recipe


def test_every_training_argument_has_its_place(small):
    """Each field of HF's can be written in `train:` or names who owns it."""
    settings = load_recipe([small]).resolved()["train"]
    arguments = set(NeoXTrainingArguments.__dataclass_fields__)
    assert set(settings) - {"global_batch_size"} == arguments - set(REFUSED)
    assert set(REFUSED) <= arguments


def test_batch_and_accumulation_follow_the_world(small):
    recipe = load_recipe([small], overrides=["train.global_batch_size=24"])
    assert [recipe.accumulation_steps(world) for world in (1, 2, 3, 4)] == [12, 6, 4, 3]
    assert {recipe.samples_per_step(world) for world in (1, 2, 3, 4)} == {24}
    plain = load_recipe([small], overrides=["train.gradient_accumulation_steps=3"])
    assert plain.samples_per_step(2) == 2 * 3 * 2


@pytest.mark.parametrize(
    ("world", "override", "message"),
    [
        (
            5,
            "train.seed=1",
            "data.streams = 12 cannot be dealt evenly to 5 data-parallel ranks (world of 5 = 1 pipeline x "
            "5 data x 1 tensor); launch a number of processes for which it can, or set data.streams to a multiple of 5",
        ),
        (
            4,
            "train.global_batch_size=6",
            "train.global_batch_size = 6 is no multiple of train.per_device_train_batch_size x 4 data-parallel ranks "
            "= 8 (world of 4 = 1 pipeline x 4 data x 1 tensor); change one of the three",
        ),
        (
            2,
            "train={global_batch_size: 24, gradient_accumulation_steps: 3}",
            "train.gradient_accumulation_steps = 3, but train.global_batch_size = 24 takes 6 with 2 data-parallel "
            "ranks (world of 2 = 1 pipeline x 2 data x 1 tensor); leave the accumulation out, it follows from the "
            "world",
        ),
    ],
)
def test_a_world_that_does_not_fit(small, world, override, message):
    with pytest.raises(TopologyError) as error:
        load_recipe([small], overrides=[override]).topology(world)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("samples", "nearest"), [(20, "18 or 24"), (5, "6"), (6, None)], ids=["between two", "too few", "right"]
)
@pytest.mark.parametrize("when", ["train.eval_strategy=steps", "train.eval_on_start=true"])
def test_an_evaluation_is_shared_out_evenly(small, samples, nearest, when):
    overrides = [f"data.eval_samples={samples}", "train.per_device_eval_batch_size=2"]
    assert load_recipe([small], overrides=overrides).topology(3).data == 3  # it never evaluates
    recipe = load_recipe([small], overrides=[*overrides, when])
    if nearest is None:
        assert recipe.topology(3).data == 3
        return
    with pytest.raises(TopologyError) as error:
        recipe.topology(3)
    assert str(error.value) == (
        f"data.eval_samples = {samples} is no multiple of train.per_device_eval_batch_size x 3 data-parallel ranks "
        f"= 6 (world of 3 = 1 pipeline x 3 data x 1 tensor); set it to {nearest}"
    )


@pytest.mark.parametrize("key", ["torch_compile=true", "torch_compile_backend=eager", "torch_compile_mode=default"])
def test_what_compiles(small, key):
    assert load_recipe([small]).compiles is False
    assert load_recipe([small], overrides=[f"train.{key}"]).compiles is True


def test_model_parallel_sizes_divide_the_world():
    parallel = ParallelSettings(tensor=2, pipeline=2, sequence=True)
    with pytest.raises(TopologyError) as error:
        Recipe(parallel=parallel).topology(6)
    assert str(error.value) == (
        "parallel.tensor=2 x parallel.pipeline=2 = 4 does not divide world_size=6, so no data size "
        "fits; launch 4 processes or a multiple of it"
    )
    topology = Recipe(parallel=parallel).topology(8, rank=5)
    assert (str(topology), topology.rank, topology.sequence) == ("8 = 2 pipeline x 2 data x 2 tensor", 5, True)


def test_a_world_that_is_too_small_names_the_command():
    with pytest.raises(TopologyError) as error:
        Recipe(parallel=ParallelSettings(tensor=2, pipeline=3)).topology(1)
    assert str(error.value) == (
        "parallel.pipeline = 3 x parallel.tensor = 2 takes 6 processes, or a multiple of that, and the world has 1; "
        "launch with `accelerate launch --multi_gpu --num_processes 6 recipes/pretrain.py --config ...`. Without "
        "--multi_gpu, accelerate starts one process on a host without GPUs"
    )


def test_training_arguments(small, tmp_path):
    overrides = [
        f"train.output_dir={tmp_path}",
        "train.global_batch_size=8",
        "train.precision=fp32",
        "train.save_steps=3",
    ]
    arguments = load_recipe([small], overrides=overrides).training_arguments()
    assert arguments.max_steps == 5
    assert arguments.gradient_accumulation_steps == 4
    assert (arguments.bf16, arguments.fp16, arguments.push_to_hub) == (False, False, False)
    assert (arguments.save_strategy, arguments.save_steps) == ("steps", 3)
    assert arguments.world_size == 1


def test_amp_is_the_autocast_of_hf(small, tmp_path):
    overrides = [f"train.output_dir={tmp_path}", "train.precision=amp"]
    assert load_recipe([small], overrides=overrides).training_arguments().bf16 is True


def test_a_schedule_of_its_own_turns_the_saving_of_hf_off(small, tmp_path):
    overrides = [f"train.output_dir={tmp_path}", "train.save_schedule=pythia"]
    assert load_recipe([small], overrides=overrides).training_arguments().save_strategy == "no"


def test_without_cuda_the_recipe_asks_for_the_cpu(small, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert load_recipe([small], overrides=[f"train.output_dir={tmp_path}"]).training_arguments().use_cpu is True


def test_what_hf_refuses_is_a_recipe_error(small, tmp_path):
    recipe = load_recipe([small], overrides=[f"train.output_dir={tmp_path}", "train.debug=nonsense"])
    with pytest.raises(RecipeError, match=r"^train: nonsense is not a valid DebugOption"):
        recipe.training_arguments()


class World:
    """What `check_world` reads of the arguments."""

    def __init__(self, world_size, n_gpu=1):
        self.world_size = world_size
        self.n_gpu = n_gpu


def test_the_world_is_the_one_that_was_launched():
    check_world(World(4), 4)
    with pytest.raises(TopologyError) as error:
        check_world(World(1), 4)
    assert str(error.value) == (
        "4 processes were launched, but this one is in a world of 1: each would train alone; launch with "
        "`torchrun --nproc_per_node 4 recipes/pretrain.py --config ...` or with "
        "`accelerate launch --multi_gpu --num_processes 4 recipes/pretrain.py --config ...`"
    )


def test_one_process_drives_one_gpu():
    with pytest.raises(TopologyError) as error:
        check_world(World(1, n_gpu=8), 1)
    assert str(error.value) == (
        "one process was started on a host with 8 GPUs; launch one for each with "
        "`accelerate launch --multi_gpu --num_processes 8 recipes/pretrain.py --config ...`, "
        "or choose a single GPU with CUDA_VISIBLE_DEVICES=0"
    )
