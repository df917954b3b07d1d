"""A model laid out over gloo ranks with an optimizer state that is known by its names; no step is taken."""

import hashlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neox_hf import GPTNeoXConfig
from neox_hf.checkpoint import CheckpointWriter, hf_names, load_optimizer, open_checkpoint, write_optimizer
from neox_hf.checkpoint.host_memory import HostMemory
from neox_hf.modeling.causal_lm import GPTNeoXForCausalLM
from neox_hf.modeling.fresh_weights import draw_weights
from neox_hf.modeling.stage import Stage
from neox_hf.parallel.shards import shards_of
from neox_hf.parallel.topology import Topology
from tests.checkpoint.conftest import SIZES

SLOTS = ("exp_avg", "exp_avg_sq")


def split_model(topology: Topology, seed: int, tied: bool = False) -> GPTNeoXForCausalLM:
    """What this rank holds of the model; two layers a stage."""
    config = GPTNeoXConfig(
        **{**SIZES, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 200, "tie_word_embeddings": tied}
    )
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(config, topology)
    bounds = [stage * 4 // topology.pipeline for stage in range(topology.pipeline + 1)]
    stage = Stage.of_rank(model, topology, bounds)
    draw_weights(model, seed, "cpu", stage.local_modules if topology.pipeline > 1 else None)
    return model


def local_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if not parameter.is_meta]


def wanted(name: str, slot: str, shape: tuple[int, ...]) -> Tensor:
    """The whole tensor of a slot: a function of its name."""
    seed = int.from_bytes(hashlib.sha256(f"{slot} of {name}".encode()).digest()[:4], "little")
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def optimizer_of(model: nn.Module, *, stepped: bool) -> torch.optim.AdamW:
    matrices = [p for p in local_parameters(model) if p.ndim > 1]
    others = [p for p in local_parameters(model) if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    names, shards = hf_names(model), shards_of(model)
    for parameter in local_parameters(model) if stepped else []:
        state = {"step": torch.tensor(7.0)}
        for slot in SLOTS:
            state[slot] = torch.zeros_like(parameter)
            shard = shards.get(parameter)
            whole = wanted(names[parameter], slot, shard.shape if shard else parameter.shape)
            (shard.real(state[slot]) if shard else state[slot]).copy_(shard.cut(whole) if shard else whole)
        optimizer.state[parameter] = state
    return optimizer


def save(topology: Topology, output_dir: Path, tied: bool, deferred: bool = False, **weights: int) -> None:
    model = split_model(topology, seed=1, tied=tied)
    barrier = dist.barrier if topology.world_size > 1 else lambda: None
    memory = HostMemory() if deferred else None
    writer = CheckpointWriter(
        output_dir, 3, rank=topology.rank, world_size=topology.world_size, barrier=barrier, memory=memory
    )
    writer.write_weights(model, topology=topology, **weights)
    names, shards, optimizer = hf_names(model), shards_of(model), optimizer_of(model, stepped=True)
    write_optimizer(writer, optimizer, names, shards, topology)
    if deferred:
        with torch.no_grad():
            for parameter in local_parameters(model):
                parameter.fill_(-1.0)  # as the next step would change them
                optimizer.state[parameter]["exp_avg"].fill_(-1.0)
    sizes = {"pipeline": topology.pipeline, "data": topology.data, "tensor": topology.tensor}
    writer.commit(sizes)


def check_load(topology: Topology, path: Path, tied: bool) -> None:
    """Load into a model of other weights; every element must be what it was, and padding zero."""
    checkpoint = open_checkpoint(path)
    model, truth = split_model(topology, seed=2, tied=tied), split_model(topology, seed=1, tied=tied)
    checkpoint.load_weights(model, topology=topology)
    for ours, theirs in zip(local_parameters(model), local_parameters(truth), strict=True):
        assert torch.equal(ours, theirs)
    optimizer, wanted_state = optimizer_of(model, stepped=False), optimizer_of(truth, stepped=True).state
    load_optimizer(optimizer, hf_names(model), shards_of(model), checkpoint, topology)
    shards = shards_of(model)
    for ours, theirs in zip(local_parameters(model), local_parameters(truth), strict=True):
        found, expected = optimizer.state[ours], wanted_state[theirs]
        assert found["step"] == expected["step"]
        for slot in SLOTS:
            parts = [shards[ours].real(s[slot]) if ours in shards else s[slot] for s in (found, expected)]
            assert torch.equal(*parts), slot


def save_split(rank: int, folder: str, sizes: dict[str, int], tied: bool, deferred: bool, shard_bytes: int) -> None:
    topology = Topology.from_world(dist.get_world_size(), rank, **sizes).connect()
    save(topology, Path(folder), tied, deferred, shard_bytes=shard_bytes)


def load_split(rank: int, path: str, layouts: list[dict[str, int]], tied: bool) -> None:
    for sizes in layouts:
        check_load(Topology.from_world(dist.get_world_size(), rank, **sizes).connect(), Path(path), tied)
