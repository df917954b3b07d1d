"""Any optimizer's state comes back bit for bit, by names, without a step."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from neox_hf.checkpoint import CheckpointWriter, load_optimizer, open_checkpoint, write_optimizer
from neox_hf.checkpoint.host_memory import HostMemory
from neox_hf.errors import CheckpointError
from neox_hf.training.optimizers import MasterAdamW


class Lion(Optimizer):
    """Keeps one moment, a Python step, a flag and, on request, a moment per row."""

    def __init__(self, params, lr=0.01, betas=(0.9, 0.99), per_row=False) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "per_row": per_row})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), step=0, seen=False, note="new", ratio=np.float64(0.1))
                    if group["per_row"]:
                        state["rows"] = torch.zeros(p.shape[:1])
                first, second = group["betas"]
                update = state["exp_avg"].lerp(p.grad, 1 - first).sign()
                p.sub_(update * group["lr"] / (1 + 0.1 * state["step"]))
                state["exp_avg"].lerp_(p.grad, 1 - second)
                state["step"] += 1
                state["seen"] = True
                state["ratio"] *= 1.1
                if group["per_row"]:
                    state["rows"] += p.grad.reshape(len(p), -1).sum(1)


class MasterSGD(Optimizer):
    """Steps an fp32 copy of bf16 weights, made at construction."""

    def __init__(self, params, lr=0.1) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"master": p.detach().float(), "step": torch.zeros(())}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] += 1
                p.copy_(self.state[p]["master"].sub_(p.grad.float() * group["lr"]))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.second = nn.Linear(4, 3)
        self.unused = nn.Parameter(torch.randn(2))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) * self.scale


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def groups_of(model: Net) -> list[dict]:
    return [
        {"params": [model.first.weight, model.second.weight], "weight_decay": 0.1},
        {"params": [model.first.bias, model.second.bias, model.unused, model.scale], "weight_decay": 0.0},
    ]


OPTIMIZERS: dict[str, Callable[[list[dict]], Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "adamw_fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "adamw_foreach_amsgrad": lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=True, amsgrad=True),
    "adamw_tensor_lr": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(0.01)),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, betas=(0.8, 0.95)),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
    "plain_sgd": lambda groups: torch.optim.SGD(groups, lr=0.01),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, centered=True, momentum=0.5),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.01),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "radam": lambda groups: torch.optim.RAdam(groups, lr=0.01),
    "rprop": lambda groups: torch.optim.Rprop(groups, lr=0.01),
    "asgd": lambda groups: torch.optim.ASGD(groups, lr=0.01),
    "adamax": lambda groups: torch.optim.Adamax(groups, lr=0.01),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
    "lion": Lion,
    "lion_per_row": lambda groups: Lion(groups[:1], per_row=True),
}


def train(model: nn.Module, optimizer: Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 5, generator=generator).to(model.first.weight.dtype)
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()


def names_of(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: f"net.{name}" for name, parameter in model.named_parameters()}


def save(optimizer, model, output_dir):
    writer = CheckpointWriter(output_dir, 1)
    write_optimizer(writer, optimizer, names_of(model))
    return open_checkpoint(writer.commit())


def assert_same_state(ours: Optimizer, theirs: Optimizer) -> None:
    left, right = ours.state_dict(), theirs.state_dict()
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for key, wanted in right["state"].items():
        assert left["state"][key].keys() == wanted.keys()
        for name, value in wanted.items():
            found = left["state"][key][name]
            assert type(found) is type(value) or isinstance(value, np.generic)
            if isinstance(value, torch.Tensor):
                assert (found.dtype, found.device, found.shape) == (value.dtype, value.device, value.shape)
                assert torch.equal(found, value)
            else:
                assert found == value


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_comes_back_and_continues_equally(tmp_path, name):
    model = net()
    optimizer = OPTIMIZERS[name](groups_of(model))
    train(model, optimizer, steps=4)
    for group in optimizer.param_groups:
        group["lr"], group["initial_lr"] = group["lr"] / 3, group["lr"]  # as a schedule does
    checkpoint = save(optimizer, model, tmp_path)

    resumed = net(seed=1)
    resumed.load_state_dict(model.state_dict())
    other = OPTIMIZERS[name](groups_of(resumed))
    load_optimizer(other, names_of(resumed), {}, checkpoint)
    assert_same_state(other, optimizer)
    train(model, optimizer, steps=3, first=4)
    train(resumed, other, steps=3, first=4)
    assert_same_state(other, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_tensors_that_the_optimizer_keeps_are_filled_in_place(tmp_path):
    model = net().bfloat16()
    del model.unused
    optimizer = MasterSGD(model.parameters())
    train(model, optimizer, steps=3)
    checkpoint = save(optimizer, model, tmp_path)
    resumed = net(seed=1).bfloat16()
    del resumed.unused
    other = MasterSGD(resumed.parameters())
    master = other.state[resumed.first.weight]["master"]
    load_optimizer(other, names_of(resumed), {}, checkpoint)
    assert other.state[resumed.first.weight]["master"] is master
    assert master.dtype == torch.float32
    assert_same_state(other, optimizer)


@pytest.mark.parametrize("deferred", [False, True])
def test_masters_of_which_half_is_kept_are_whole_on_disk(tmp_path, deferred):
    """As they were when they were given to the writer, whatever is trained before it commits."""
    model = net().bfloat16()
    optimizer = MasterAdamW(groups_of(model), lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    train(model, optimizer, steps=3)
    masters = {name: optimizer.master_of(p) for p, name in names_of(model).items() if p is not model.unused}
    weights = [p.detach().clone() for p in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    writer = CheckpointWriter(tmp_path, 1, memory=HostMemory() if deferred else None)
    write_optimizer(writer, optimizer, names_of(model))
    train(model, optimizer, steps=1, first=3)
    checkpoint = open_checkpoint(writer.commit())
    saved = checkpoint.boxes("optimizer.master")
    for name, master in masters.items():
        (box,) = saved.find(name)
        assert torch.equal(saved.read(box, tuple(slice(0, n) for n in box.extent)), master)
        assert not torch.equal(master, master.bfloat16().float())
    assert not saved.find("net.unused")

    other = net(seed=1).bfloat16()
    loaded = MasterAdamW(groups_of(other), lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    with torch.no_grad():
        other.unused.copy_(model.unused)
    train(other, loaded, steps=1)  # has remainders of its own
    load_optimizer(loaded, names_of(other), {}, checkpoint)
    assert all(torch.equal(p, wanted) for p, wanted in zip(other.parameters(), weights, strict=True))
    loaded_state = loaded.state_dict()["state"]
    for key, slots in state["state"].items():
        assert loaded_state[key].keys() == slots.keys()
        assert all(torch.equal(loaded_state[key][slot], value) for slot, value in slots.items())


def test_loading_replaces_an_older_state(tmp_path):
    model = net()
    fresh = save(torch.optim.AdamW(groups_of(model)), model, tmp_path / "fresh")
    optimizer = torch.optim.AdamW(groups_of(model))
    train(model, optimizer, steps=2)
    used = save(optimizer, model, tmp_path / "used")
    wanted = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, steps=2)
    load_optimizer(optimizer, names_of(model), {}, used)
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], wanted["state"][0]["exp_avg"])
    assert optimizer.state_dict()["state"][0]["step"] == 2
    with pytest.raises(CheckpointError, match=r"lacks \['exp_avg', 'exp_avg_sq'\] of net\.first\.weight"):
        load_optimizer(optimizer, names_of(model), {}, fresh)


def test_a_parameter_without_elements_and_one_in_another_order(tmp_path):
    model = nn.ParameterDict({"empty": torch.zeros(0, 3), "turned": torch.randn(4, 3).t()})
    optimizer, other = (torch.optim.AdamW(model.parameters(), lr=0.01) for _ in range(2))
    sum((p * 3).square().sum() for p in model.values()).backward()
    optimizer.step()
    assert optimizer.state[model["turned"]]["exp_avg"].stride() == (1, 3)
    load_optimizer(other, names_of(model), {}, save(optimizer, model, tmp_path))
    assert_same_state(other, optimizer)


def test_how_a_step_is_carried_out_is_this_machines_choice(tmp_path):
    model = net()
    optimizer = torch.optim.AdamW(groups_of(model), fused=True)
    train(model, optimizer, steps=1)
    other = torch.optim.AdamW(groups_of(model), foreach=False)
    load_optimizer(other, names_of(model), {}, save(optimizer, model, tmp_path))
    assert (other.param_groups[0]["fused"], other.param_groups[0]["foreach"]) == (None, False)
    train(model, other, steps=1)


def test_what_lies_on_disk(tmp_path):
    model = net()
    optimizer = torch.optim.AdamW(groups_of(model))
    train(model, optimizer, steps=1)
    checkpoint = save(optimizer, model, tmp_path)
    saved = checkpoint.json("state/optimizer.json")
    assert saved["optimizer"] == "AdamW"
    assert saved["slots"] == ["exp_avg", "exp_avg_sq"]
    assert saved["groups"][0]["names"] == ["net.first.weight", "net.second.weight"]
    assert saved["parameters"]["net.first.weight"]["scalars"]["step"] == {"tensor": "float32", "value": 1.0}
    assert saved["parameters"]["net.unused"]["slots"] == {}
    (box,) = checkpoint.boxes("optimizer.exp_avg").find("net.first.weight")
    assert (box.extent, box.shape) == ((4, 5), (4, 5))


def test_floats_keep_every_bit(tmp_path):
    model = net()
    optimizer = Lion(groups_of(model), lr=math.nextafter(0.1, 1))
    train(model, optimizer, steps=1)
    optimizer.state[model.scale]["ratio"] = math.inf
    other = Lion(groups_of(model))
    load_optimizer(other, names_of(model), {}, save(optimizer, model, tmp_path))
    assert other.param_groups[0]["lr"] == math.nextafter(0.1, 1)
    assert other.state[model.scale]["ratio"] == math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model, groups: torch.optim.Adam(groups),
            "the checkpoint's optimizer is AdamW, this run's is Adam; resume",
        ),
        (
            lambda model, groups: torch.optim.AdamW([{"params": [model.first.weight]}, groups[1]]),
            r"parameters differ: only in the checkpoint \['net\.second\.weight'\], only in this run \[\]",
        ),
        (
            lambda model, groups: torch.optim.AdamW(model.parameters()),
            r"first\.bias and net\.first\.weight are in optimizer groups with different .* in the checkpoint only",
        ),
        (
            lambda model, groups: torch.optim.AdamW(
                [
                    {**groups[0], "eps": 1e-5, "params": [model.first.weight]},
                    {**groups[0], "params": [model.second.weight]},
                    groups[1],
                ]
            ),
            r"first\.weight and net\.second\.weight are in optimizer groups with different .* in this run only",
        ),
    ],
)
def test_another_optimizer_is_refused_and_unchanged(tmp_path, change, message):
    model = net()
    optimizer = torch.optim.AdamW(groups_of(model))
    train(model, optimizer, steps=1)
    checkpoint = save(optimizer, model, tmp_path)
    other = change(model, groups_of(model))
    with pytest.raises(CheckpointError, match=message):
        load_optimizer(other, names_of(model), {}, checkpoint)
    assert not other.state


def test_another_shape_is_refused(tmp_path):
    model, other = net(), net()
    checkpoint = save(torch.optim.AdamW(groups_of(model)), model, tmp_path)
    other.first = nn.Linear(6, 4)
    with pytest.raises(CheckpointError, match=r"net\.first\.weight has shape \(4, 5\) .* and \(4, 6\) in this run"):
        load_optimizer(torch.optim.AdamW(groups_of(other)), names_of(other), {}, checkpoint)


def test_another_dtype_of_a_slot_is_refused_and_unchanged(tmp_path):
    model = net()
    optimizer = torch.optim.AdamW(groups_of(model))
    train(model, optimizer, steps=1)
    checkpoint = save(optimizer, model, tmp_path)
    last = optimizer.state[model.scale]
    last["exp_avg_sq"] = last["exp_avg_sq"].double()
    first = optimizer.state[model.first.weight]["exp_avg"].zero_()
    with pytest.raises(CheckpointError, match=r"net\.scale is torch\.float32 .* torch\.float64 in this run"):
        load_optimizer(optimizer, names_of(model), {}, checkpoint)
    assert not first.any()


def test_a_parameter_without_a_name_is_refused(tmp_path):
    model = net()
    optimizer = torch.optim.AdamW([*model.parameters(), nn.Parameter(torch.zeros(7, 7))])
    with pytest.raises(
        CheckpointError, match=r"a parameter of shape \(7, 7\) in optimizer group 0 belongs to no module"
    ):
        save(optimizer, model, tmp_path)


def test_state_of_no_parameter_is_refused(tmp_path):
    model = net()
    optimizer = torch.optim.AdamW(groups_of(model))
    optimizer.state["calls"] = 3
    with pytest.raises(CheckpointError, match="keeps state for 'calls', which is no parameter"):
        save(optimizer, model, tmp_path)


@pytest.mark.parametrize(("value", "kind"), [({"a": 1}, "dict"), (torch.zeros((), dtype=torch.cfloat), "Tensor")])
def test_what_only_pickle_could_save_is_refused(tmp_path, value, kind):
    model = net()
    optimizer = torch.optim.AdamW(groups_of(model))
    optimizer.state[model.scale]["odd"] = value if kind == "dict" else [value]
    with pytest.raises(CheckpointError, match=rf"state 'odd' of net\.scale is a {kind}, which cannot be saved"):
        save(optimizer, model, tmp_path)


def test_a_slot_with_an_odd_name_is_refused(tmp_path):
    model = net()
    optimizer = torch.optim.AdamW(groups_of(model))
    optimizer.state[model.first.weight]["../x"] = torch.zeros(2)
    with pytest.raises(CheckpointError, match=r"slot '../x' cannot be part of a file name"):
        save(optimizer, model, tmp_path)


@pytest.mark.parametrize("world_size", [2, 20])
def test_parameters_are_dealt_to_the_ranks(tmp_path, world_size):
    model = net()
    optimizer = torch.optim.AdamW(groups_of(model))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    writers = [CheckpointWriter(tmp_path, 1, rank=rank, world_size=world_size) for rank in range(world_size)]
    for writer in writers:
        write_optimizer(writer, optimizer, names_of(model))
    for writer in writers[1:]:
        writer.seal()
    checkpoint = open_checkpoint(writers[0].commit())
    assert len(list((checkpoint.path / "state").glob("optimizer.exp_avg-*"))) == world_size
    other = torch.optim.AdamW(groups_of(model))
    load_optimizer(other, names_of(model), {}, checkpoint)
    assert_same_state(other, optimizer)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"fused": True}, {"capturable": True}, {"foreach": True}])
def test_state_on_a_device_comes_back_there(tmp_path, settings):
    model = net().cuda()
    optimizer = torch.optim.AdamW(groups_of(model), **settings)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    other = torch.optim.AdamW(groups_of(model), **settings)
    load_optimizer(other, names_of(model), {}, save(optimizer, model, tmp_path))
    assert_same_state(other, optimizer)
    other.step()
