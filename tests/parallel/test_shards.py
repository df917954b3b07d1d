"""Shares of a tensor, and the padding beyond its end."""

import torch
from torch import nn

from neox_hf.parallel.shards import Shard, Sharded, shards_of


def test_shares_join_to_the_whole():
    whole = torch.arange(24).view(6, 4)
    for dim, size in ((0, 3), (1, 2)):
        parts = [Shard.of_rank(dim, (6, 4), rank, size).cut(whole) for rank in range(size)]
        assert torch.equal(torch.cat(parts, dim), whole)


def test_padding_belongs_to_nobody():
    whole = torch.arange(10).view(5, 2)
    shares = [Shard.of_rank(0, (5, 2), rank, 4, padded=8) for rank in range(4)]
    assert [share.length for share in shares] == [2, 2, 1, 0]
    assert [share.offsets for share in shares] == [(0, 0), (2, 0), (4, 0), (5, 0)]
    assert torch.equal(torch.cat([share.cut(whole) for share in shares]), whole)
    assert shares[2].real(torch.zeros(2, 2)).shape == (1, 2)
    assert shares[3].real(torch.zeros(2, 2)).shape == (0, 2)


def test_a_model_tells_its_shards():
    class Half(Sharded, nn.Linear):
        def shards(self):
            return {"weight": Shard.of_rank(0, (4, 3), 1, 2), "bias": Shard.of_rank(0, (4,), 1, 2)}

    model = nn.Sequential(Half(3, 2, bias=False), nn.Linear(2, 2))
    assert shards_of(model) == {model[0].weight: Shard(0, 2, 2, (4, 3))}
