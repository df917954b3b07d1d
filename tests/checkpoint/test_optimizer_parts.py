"""The state of replicas that each keep a part: on disk as each has it, and back at any number of replicas."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from neox_hf.checkpoint import CheckpointWriter, load_optimizer, open_checkpoint, write_optimizer
from neox_hf.checkpoint.directory import rank_file
from neox_hf.parallel.parts import ReplicaParts
from neox_hf.parallel.topology import Topology
from neox_hf.training.optimizers import MasterAdamW
from tests.gloo import run_ranks

SLOTS = ("master", "exp_avg", "exp_avg_sq")


def net(seed: int) -> nn.Module:
    """The last bias cannot be cut, and the first layer is in fp32."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 5).bfloat16())


def names_of(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def optimizer_of(model: nn.Module, cut: bool) -> MasterAdamW:
    optimizer = MasterAdamW(model.parameters(), lr=0.01, kernels="torch")
    if cut:
        optimizer.step_in_parts(ReplicaParts(model.parameters()))
    return optimizer


def take_steps(model: nn.Module, optimizer: MasterAdamW, seed: int) -> None:
    """Two, whose gradients are the same on every replica."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad_dtype = torch.float32
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if optimizer.parts is not None and parameter in optimizer.parts:
                optimizer.parts.of(parameter).grad = optimizer.parts.cut(parameter, parameter.grad).clone()
        optimizer.step()


def state_of(model: nn.Module, optimizer: MasterAdamW) -> dict[str, Tensor]:
    """Flat, of what this replica steps."""
    found = {f"{name}.weight": p.detach().float().flatten() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        mine = parameter if optimizer.parts is None else optimizer.parts.of(parameter)
        found[f"{name}.master"] = optimizer.master_of(mine).flatten()
        found |= {f"{name}.{slot}": optimizer.state[mine][slot].flatten() for slot in SLOTS[1:]}
        found[f"{name}.step"] = optimizer.state[mine]["step"].view(1)
    return found


def topology() -> Topology:
    return Topology(data=dist.get_world_size(), rank=dist.get_rank()).connect()


def save(rank: int, folder: str) -> None:
    model = net(seed=0)
    optimizer = optimizer_of(model, cut=True)
    take_steps(model, optimizer, seed=1)
    here = topology()
    writer = CheckpointWriter(folder, 1, rank=rank, world_size=here.world_size, barrier=dist.barrier)
    write_optimizer(writer, optimizer, names_of(model), topology=here)
    writer.commit()


def load(rank: int, path: str, cut: bool) -> dict[str, Tensor]:
    model = net(seed=5)
    optimizer = optimizer_of(model, cut)
    load_optimizer(optimizer, names_of(model), {}, open_checkpoint(path), topology())
    if cut:
        optimizer.parts.gather()
    take_steps(model, optimizer, seed=2)
    return state_of(model, optimizer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("parts")
    run_ranks(save, 2, str(folder))
    return str(folder / "checkpoint-1")


@pytest.fixture(scope="module")
def wanted() -> dict[str, Tensor]:
    """Of one process that takes all of the steps."""
    model = net(seed=0)
    optimizer = optimizer_of(model, cut=False)
    take_steps(model, optimizer, seed=1)
    take_steps(model, optimizer, seed=2)
    return state_of(model, optimizer)


@pytest.mark.parametrize(("world_size", "cut"), [(1, False), (2, True), (4, True), (2, False)])
def test_a_run_goes_on_at_any_number_of_replicas(saved, wanted, world_size, cut):
    for rank, found in enumerate(run_ranks(load, world_size, saved, cut)):
        for name, whole in wanted.items():
            share = found[name].numel()
            first = rank * share if share < whole.numel() else 0
            assert torch.equal(found[name], whole[first : first + share]), (name, rank)
            assert share == whole.numel() or cut


def test_each_replica_writes_the_rows_that_it_steps(saved):
    """So nothing is sent. What both step, one writes."""
    checkpoint = open_checkpoint(saved)
    for slot in SLOTS:
        stem = f"optimizer.{slot}"
        boxes = checkpoint.boxes(stem)
        first, second = (Path(rank_file(stem, rank, 2)).name for rank in range(2))
        found = {name: {(b.file, b.offsets, b.extent) for b in boxes.find(name)} for name in boxes.names()}
        both = found.pop("1.bias")
        assert both in ({(first, (0,), (5,))}, {(second, (0,), (5,))})
        assert found == {
            "0.weight": {(first, (0, 0), (16, 16)), (second, (16, 0), (16, 16))},
            "0.bias": {(first, (0,), (16,)), (second, (16,), (16,))},
            "1.weight": {
                (first, (0, 0), (2, 32)),
                (first, (2, 0), (1, 16)),
                (second, (2, 16), (1, 16)),
                (second, (3, 0), (2, 32)),
            },
        }
