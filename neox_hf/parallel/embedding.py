"""The vocabulary split over a tensor group: its embedding, and its head.

Rows are padded to a multiple of 128 x size, so that every rank holds as many. Padding rows exist in memory only: they
are zero, no token is theirs, and logits end where the vocabulary does. In a group of one nothing is padded, and
`vocabulary_embedding` and `vocabulary_head` give plain torch modules.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neox_hf.kernels.embedding import embedding
from neox_hf.parallel.messages import start_gather
from neox_hf.parallel.shards import Shard, Sharded
from neox_hf.parallel.tensor_region import TensorRegion

ROWS_MULTIPLE = 128
"""Rows of a rank's share are a multiple of this, which keeps the head's matrix product fast."""


def vocabulary_embedding(vocabulary: int, features: int, region: TensorRegion) -> nn.Embedding:
    """An embedding whose rows are split over the region."""
    if region.size == 1:
        return nn.Embedding(vocabulary, features)
    return VocabParallelEmbedding(vocabulary, features, region)


def vocabulary_head(features: int, vocabulary: int, region: TensorRegion) -> nn.Linear:
    """A linear without bias whose outputs, one a word, are split over the region."""
    if region.size == 1:
        return nn.Linear(features, vocabulary, bias=False)
    return VocabParallelHead(features, vocabulary, region)


def rows_in_memory(vocabulary: int, size: int) -> int:
    """Rows that each of `size` ranks holds, padding included."""
    return -(-vocabulary // (ROWS_MULTIPLE * size)) * ROWS_MULTIPLE


def vocabulary_shard(vocabulary: int, features: int, region: TensorRegion) -> Shard:
    """This rank's rows of a matrix [vocabulary, features]."""
    padded = rows_in_memory(vocabulary, region.size) * region.size
    return Shard.of_rank(0, (vocabulary, features), region.rank, region.size, padded)


class VocabParallelEmbedding(nn.Embedding, Sharded):
    """Token ids [B, S] to features, replicated [B, S, H] or scattered [B, S / size, H]."""

    def __init__(self, vocabulary: int, features: int, region: TensorRegion) -> None:
        super().__init__(rows_in_memory(vocabulary, region.size), features)
        self.region = region
        self.shard = vocabulary_shard(vocabulary, features, region)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.look_up(input_ids)

    def look_up(self, input_ids: Tensor, *, shared: bool = True, kernels: str = "auto") -> Tensor:
        """What calling it gives, of token ids [B, S]. shared: of `kernels.embedding`. kernels: `auto | triton | torch`.

        Raises:
            ValueError: of `kernels.embedding`.
            TopologyError: under sequence parallelism S does not divide by the size.
        """
        rows = input_ids - self.shard.start
        if self.shard.length < self.num_embeddings:
            rows = rows.masked_fill(rows >= self.shard.length, -1)  # padding is nobody's
        found = embedding(rows, self.weight, shared=shared, of_share=True, backend=kernels)
        return self.region.in_mode(self.training).leave(found)

    def shards(self) -> dict[str, Shard]:
        return {"weight": self.shard}


class VocabParallelHead(nn.Linear, Sharded):
    """Features [..., H], replicated, to the logits of the whole vocabulary [..., V] on every rank.

    The gradient of the features comes back partial. A loss that needs no logits reads `weight` and `shard` instead.
    """

    def __init__(self, features: int, vocabulary: int, region: TensorRegion) -> None:
        super().__init__(features, rows_in_memory(vocabulary, region.size), bias=False)
        self.region = region
        self.shard = vocabulary_shard(vocabulary, features, region)

    def forward(self, features: Tensor) -> Tensor:
        return _gather_words(self.region, self.shard, F.linear(features, self.weight))

    def shards(self) -> dict[str, Shard]:
        return {"weight": self.shard}


class _GatherWords(torch.autograd.Function):
    """Logits of each rank's words to those of all words, and back: a replicated gradient to this rank's part of it."""

    @staticmethod
    def forward(ctx: Any, region: TensorRegion, shard: Shard, local: Tensor) -> Tensor:
        ctx.shard, ctx.padding = shard, local.shape[-1] - shard.length
        everyone = start_gather(local, region).wait().movedim(0, -2).flatten(-2)
        return everyone[..., : shard.shape[0]].contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        own = gradient.narrow(-1, ctx.shard.offsets[0], ctx.shard.length)
        return None, None, F.pad(own, (0, ctx.padding))


# A compiler splits its graph here: messages are none of its business.
_gather_words = torch.compiler.disable(_GatherWords.apply)
