"""20 and 175 billion parameters laid out rank by rank on one CPU: names and shapes are real, memory is none."""

import dataclasses
import math
from itertools import pairwise, product

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from neox_hf import GPTNeoXConfig, GPTNeoXForCausalLM, preset_config
from neox_hf.errors import TopologyError
from neox_hf.modeling.accounting import parameter_count, rank_parameters
from neox_hf.modeling.partition import stage_bounds
from neox_hf.modeling.stage import Stage
from neox_hf.parallel.shards import shards_of
from neox_hf.parallel.topology import Topology

B20 = preset_config("gpt-neox-20b"), Topology(tensor=2, pipeline=4)
B175 = (
    GPTNeoXConfig(
        vocab_size=50257,
        hidden_size=12288,
        num_hidden_layers=96,
        num_attention_heads=96,
        intermediate_size=4 * 12288,
        max_position_embeddings=2048,
    ),
    Topology(tensor=8, pipeline=12),
)


def model_of(config, topology):
    with torch.device("meta"):
        return GPTNeoXForCausalLM(config, topology)


def stage_of(config, topology, rank):
    place = dataclasses.replace(topology, rank=rank)
    model = model_of(config, place)
    return model, Stage.of_rank(model, place, stage_bounds(config, topology.pipeline))


@pytest.mark.parametrize(
    ("config", "topology", "ranks"),
    [(*B20, range(8)), (*B175, [0, 7, 40, 88, 95])],
    ids=["20B", "175B"],
)
def test_plan_equals_every_rank_that_is_built(config, topology, ranks):
    plan = rank_parameters(config, tensor=topology.tensor, pipeline=topology.pipeline)
    assert [len(stage) for stage in plan] == [topology.tensor] * topology.pipeline
    for rank in ranks:
        _, stage = stage_of(config, topology, rank)
        counted = sum(parameter.numel() for parameter in stage.parameters())
        assert plan[rank // topology.tensor][rank % topology.tensor] == counted


@pytest.mark.parametrize("tied", [False, True])
def test_one_process_holds_everything_once(make_config, tied):
    config = make_config(tie_word_embeddings=tied)
    assert rank_parameters(config) == [[parameter_count(config)]]


def test_known_sizes():
    assert parameter_count(B20[0]) == 20_554_567_680
    assert rank_parameters(B20[0], tensor=2, pipeline=4)[0] == [2_646_985_728] * 2
    plan = [stage[0] for stage in rank_parameters(B175[0], tensor=8, pipeline=12)]
    assert max(plan) < 1.05 * min(plan)


def test_a_tied_embedding_is_on_both_ends(make_config):
    untied = rank_parameters(make_config(num_hidden_layers=4), pipeline=2)
    tied = rank_parameters(make_config(num_hidden_layers=4, tie_word_embeddings=True), pipeline=2)
    assert tied == untied


def test_explicit_bounds(make_config):
    config = make_config(num_hidden_layers=4)
    even, uneven = (rank_parameters(config, pipeline=2, partition=bounds) for bounds in ([0, 2, 4], [0, 1, 4]))
    assert sum(map(sum, even)) == sum(map(sum, uneven)) == parameter_count(config)
    assert uneven[0][0] < even[0][0]


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(TopologyError, match=r"num_attention_heads=64 does not divide by parallel\.tensor=3"):
        rank_parameters(B20[0], tensor=3)


@pytest.mark.parametrize(("config", "topology"), [B20, B175], ids=["20B", "175B"])
def test_shares_of_all_ranks_tile_every_tensor(config, topology):
    """Each element of the whole model is on one tensor rank of one stage, or is whole on a stage's every rank."""
    whole = {name: parameter.shape for name, parameter in model_of(config, None).named_parameters()}
    bounds = stage_bounds(config, topology.pipeline)
    seen: dict[str, list] = {}
    for tensor_rank in range(topology.tensor):
        model = model_of(config, dataclasses.replace(topology, rank=tensor_rank))
        shards, names = shards_of(model), {id(parameter): name for name, parameter in model.named_parameters()}
        for stage in range(topology.pipeline):
            place = dataclasses.replace(topology, rank=stage * topology.tensor + tensor_rank)
            for parameter in Stage.of_rank(model, place, bounds).parameters():
                seen.setdefault(names[id(parameter)], []).append((stage, parameter.shape, shards.get(parameter)))
    assert seen.keys() == whole.keys()
    for name, shares in seen.items():
        assert len({stage for stage, _, _ in shares}) == 1, f"{name} is on two stages"
        assert len(shares) == topology.tensor
        if shares[0][2] is None:
            assert all(shape == whole[name] for _, shape, _ in shares)
            continue
        pieces = [shard for _, _, shard in shares]
        assert all(piece.shape == tuple(whole[name]) and piece.dim == pieces[0].dim for piece in pieces)
        ends = [(piece.offsets[piece.dim], piece.offsets[piece.dim] + piece.length) for piece in pieces]
        assert ends[0][0] == 0
        assert ends[-1][1] == whole[name][pieces[0].dim]
        assert all(stop == start for (_, stop), (start, _) in pairwise(ends))


@pytest.fixture
def fake_world():
    """A process group of any size whose messages go nowhere."""

    def join(world_size, rank):
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())

    yield join
    dist.destroy_process_group()


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(("config", "sizes"), [B20, B175], ids=["20B", "175B"])
def test_a_last_stage_runs_forward_and_backward_without_memory(config, sizes, sequence, fake_world):
    fake_world(sizes.world_size, sizes.world_size - 1)
    topology = Topology.from_world(
        sizes.world_size, sizes.world_size - 1, tensor=sizes.tensor, pipeline=sizes.pipeline, sequence=sequence
    ).connect()
    model = model_of(config, topology)
    stage = Stage.of_rank(model, topology, stage_bounds(config, topology.pipeline)).train()
    length = 2048
    local_length = length // topology.tensor if sequence else length
    hidden = torch.empty(1, local_length, config.hidden_size, device="meta", requires_grad=True)
    labels = torch.zeros(1, length, dtype=torch.int64, device="meta")
    one = torch.ones((), device="meta")
    stage.loss(stage(hidden), (labels, one, one)).backward()
    assert hidden.grad.shape == hidden.shape
    assert all(parameter.grad.shape == parameter.shape for parameter in stage.parameters())


@pytest.mark.parametrize(("tensor", "pipeline"), product([1, 2, 4], [1, 2, 3]))
def test_padding_and_copies_are_all_that_a_split_adds(make_config, tensor, pipeline):
    """What ranks hold in all, less the whole model, is known in closed form."""
    config = make_config(num_hidden_layers=5, vocab_size=100)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    total = sum(map(sum, rank_parameters(config, tensor=tensor, pipeline=pipeline)))
    # A layer's two norms (weight and bias) and the biases of its two row-parallel linears; the final norm.
    copies = (tensor - 1) * (layers * 6 * hidden + 2 * hidden)
    rows = math.ceil(100 / (128 * tensor)) * 128 * tensor if tensor > 1 else 100
    assert total == parameter_count(config) + copies + 2 * (rows - 100) * hidden
