"""What `train.precision: fp8` goes with in a recipe, and each refusal by name."""

import pytest
import torch

from neox_hf.errors import RecipeError
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.recipe import load_recipe

BASE = """model: {num_hidden_layers: 2, hidden_size: 64, num_attention_heads: 4, rotary_pct: 0.5}
tokenizer: {kind: byte}
data: {sources: [{path: stdlib}], seq_length: 32, streams: 12}
train: {max_steps: 5, per_device_train_batch_size: 2, precision: fp8}
"""


@pytest.fixture
def load(tmp_path):
    recipe = tmp_path / "base.yaml"
    recipe.write_text(BASE)
    return lambda *overrides: load_recipe([str(recipe)], overrides=overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.activation_checkpointing=full",),
        ("train.activation_checkpointing=selective",),
        ("model=pythia-1.4b",),
        ("model.kernels=torch",),
        ("model.intermediate_size=200",),
    ],
)
def test_what_it_goes_with(load, overrides):
    load(*overrides)


NO_DEEPSPEED = (
    'train.precision = "fp8": scales whole linears between one step of our own optimizer and the next; DeepSpeed runs '
    "ZeRO, tensor and pipeline parallelism; use bf16, or leave parallel.zero_stage at 0 and the sizes at 1"
)
NO_COMPILER = (
    'train.precision = "fp8": runs each linear of a block outside of what train.torch_compile makes; remove that'
)
NO_MASTERS = 'train.optim = "sgd": keeps no fp32 master weights, which train.precision = fp8 needs'


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.zero_stage=1", NO_DEEPSPEED),
        ("parallel.zero_stage=3", NO_DEEPSPEED),
        ("parallel.tensor=2", NO_DEEPSPEED),
        ("parallel.pipeline=2", NO_DEEPSPEED),
        ("train.torch_compile=true", NO_COMPILER),
        ("train.torch_compile_mode=max-autotune", NO_COMPILER),
        ("train.optim=sgd", NO_MASTERS),
        ("train.ddp_bucket_cap_mb=50", "does nothing: train.precision = fp8 reduces gradients in fp32 by itself"),
        ("model.hidden_size=72", "wants model.hidden_size to be a multiple of 16, and it is 72; use bf16"),
    ],
)
def test_what_it_does_not_go_with(load, override, message):
    with pytest.raises(RecipeError) as error:
        load(override)
    assert message in str(error.value)


def test_a_gpu_without_eight_bits(load, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(RecipeError, match=r"NVIDIA A100 has CUDA capability 8.0, and eight bits want 8.9 or above; "):
        load()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    load()


def test_the_environment_does_not_change_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    arguments = NeoXTrainingArguments(output_dir=str(tmp_path), use_cpu=True, precision="fp8")
    assert (arguments.mixed_precision, arguments.bf16, arguments.keeps_master) == ("no", False, True)


@pytest.mark.parametrize("told", ["bf16", "fp8"])
def test_a_launcher_may_say_either(load, monkeypatch, told):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert load().training_arguments().mixed_precision == "no"


def test_a_launcher_may_not_say_another(load, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RecipeError, match=r"ACCELERATE_MIXED_PRECISION = fp16, but train\.precision = fp8"):
        load().training_arguments()
