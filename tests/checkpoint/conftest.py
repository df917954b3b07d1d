"""Small models and checkpoints."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import neox_hf
from neox_hf.checkpoint import Box, CheckpointWriter, write_rng

MODEL_CLASSES = {"stock": transformers.GPTNeoXForCausalLM, "ours": neox_hf.GPTNeoXForCausalLM}
CONFIG_CLASSES = {"stock": transformers.GPTNeoXConfig, "ours": neox_hf.GPTNeoXConfig}
SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}

BuildModel = Callable[..., transformers.PreTrainedModel]


def build(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **settings) -> transformers.PreTrainedModel:
    """A model whose every parameter is random and known by its seed."""
    model = MODEL_CLASSES[kind](CONFIG_CLASSES[kind](**{**SIZES, **settings}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def small_tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {f"word{number}": number for number in range(SIZES["vocab_size"])}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="word0")))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=sorted(MODEL_CLASSES))
def build_model(request: pytest.FixtureRequest) -> BuildModel:
    """Builds the stock model, then ours."""
    return lambda **settings: build(request.param, **settings)


@pytest.fixture
def write_small() -> Callable[..., Path]:
    """Writes a checkpoint without a model: one tensor, one JSON file, the generators."""

    def write(output_dir: Path, step: int, value: float = 0.0, **world) -> Path:
        writer = CheckpointWriter(output_dir, step, **world)
        writer.write_boxes("optimizer.exp_avg", [Box.whole("a.weight", torch.full((4, 3), value))])
        writer.write_json("state/data.json", {"value": value})
        write_rng(writer)
        return writer.commit({"consumed_samples": 8 * step})

    return write


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint of a tiny model at step 3, not to be changed."""
    output_dir = tmp_path_factory.mktemp("run")
    writer = CheckpointWriter(output_dir, 3)
    writer.write_weights(build("stock"))
    writer.write_boxes("optimizer.exp_avg", [Box.whole("a.weight", torch.arange(12.0).reshape(4, 3))])
    writer.write_json("trainer_state.json", {"global_step": 3})
    write_rng(writer)
    return writer.commit({"consumed_samples": 24})
