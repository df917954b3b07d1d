"""Linears and the vocabulary, split over two ranks and whole on one."""

import pytest
import torch
from torch import Tensor, nn

from neox_hf.errors import TopologyError
from neox_hf.parallel import (
    ALONE,
    ColumnParallelLinear,
    RowParallelLinear,
    Shard,
    TensorRegion,
    VocabParallelEmbedding,
    VocabParallelHead,
    column_linear,
    row_linear,
    shards_of,
    vocabulary_embedding,
    vocabulary_head,
)
from neox_hf.parallel.embedding import rows_in_memory
from neox_hf.parallel.linear import Linear
from tests.gloo import run_ranks
from tests.parallel.regions import region_of

WORDS = 200  # padded to 256: the second rank has 72 rows of words and 56 of padding


def fill(split: nn.Module, whole: nn.Module) -> None:
    shards = shards_of(split)
    with torch.no_grad():
        for name, parameter in split.named_parameters():
            value = whole.get_parameter(name)
            shard = shards.get(parameter)
            parameter.zero_()
            (parameter if shard is None else shard.real(parameter)).copy_(value if shard is None else shard.cut(value))


def whole_layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "column": nn.Linear(4, 6),
        "row": nn.Linear(6, 4),
        "embedding": nn.Embedding(WORDS, 4),
        "head": nn.Linear(4, WORDS, bias=False),
    }


def forward(layers: dict[str, nn.Module], region: TensorRegion, tokens: Tensor) -> Tensor:
    inner = torch.tanh(layers["column"](region.enter(layers["embedding"](tokens))))
    return layers["head"](region.enter(region.leave(layers["row"](inner))))


def split_pass(rank: int) -> dict[str, Tensor]:
    region = region_of(rank)
    layers = {
        "column": column_linear(4, 6, region),
        "row": row_linear(6, 4, region),
        "embedding": vocabulary_embedding(WORDS, 4, region),
        "head": vocabulary_head(4, WORDS, region),
    }
    for name, whole in whole_layers().items():
        fill(layers[name], whole)
    logits = forward(layers, region, TOKENS)
    logits.pow(2).mean().backward()
    found = {"logits": logits.detach()}
    for name, layer in layers.items():
        shards = shards_of(layer)
        for key, parameter in layer.named_parameters():
            shard = shards.get(parameter)
            found[f"{name}.{key}"] = parameter.grad if shard is None else shard.real(parameter.grad)
            assert shard is None or not shard.padding(parameter.grad).any()
    return found


TOKENS = torch.tensor([[0, 127, 128, WORDS - 1]])
"""On either side of where the vocabulary is split, and at its ends."""


def test_two_ranks_equal_one():
    whole = whole_layers()
    logits = forward(whole, ALONE, TOKENS)
    logits.pow(2).mean().backward()
    first, second = run_ranks(split_pass, 2)
    torch.testing.assert_close(first["logits"], logits)
    assert torch.equal(first["logits"], second["logits"])
    for name, layer in whole.items():
        for key, parameter in layer.named_parameters():
            dim = {"row.weight": 1, "row.bias": None}.get(f"{name}.{key}", 0)
            parts = first[f"{name}.{key}"], second[f"{name}.{key}"]
            torch.testing.assert_close(parts[0] if dim is None else torch.cat(parts, dim), parameter.grad)
            assert dim is not None or torch.equal(*parts)


def test_alone_they_split_nothing():
    assert type(column_linear(4, 6, ALONE)) is type(row_linear(6, 4, ALONE, bias=False)) is Linear
    assert type(vocabulary_embedding(5, 4, ALONE)) is nn.Embedding
    assert vocabulary_head(4, 5, ALONE).weight.shape == (5, 4)


def test_shards():
    second = TensorRegion(size=2, rank=1)
    column, row = ColumnParallelLinear(4, 6, second), RowParallelLinear(6, 4, second)
    assert column.shards() == {"weight": Shard(0, 3, 3, (6, 4)), "bias": Shard(0, 3, 3, (6,))}
    assert ColumnParallelLinear(4, 6, second, bias=False).shards() == {"weight": Shard(0, 3, 3, (6, 4))}
    assert row.shards() == {"weight": Shard(1, 3, 3, (4, 6))}
    words = Shard(0, 128, 72, (WORDS, 4))
    assert VocabParallelEmbedding(WORDS, 4, second).shards() == {"weight": words}
    assert VocabParallelHead(4, WORDS, second).shards() == {"weight": words}


def test_rows_in_memory():
    assert [rows_in_memory(50277, size) * size for size in (2, 4, 8)] == [50432, 50688, 51200]
    assert rows_in_memory(50432, 2) * 2 == 50432


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
def test_features_that_do_not_divide(kind):
    with pytest.raises(TopologyError, match=r"(out|in)_features=5 does not divide by parallel.tensor=2"):
        kind(5, 5, TensorRegion(size=2))
