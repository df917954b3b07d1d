"""Replicas that step a part each come to the bits of replicas that step everything, with a part of the state."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from neox_hf.parallel.data_parallel import DataParallel
from neox_hf.parallel.parts import ParameterPart, ReplicaParts, pieces_of
from neox_hf.training import fused_adamw
from neox_hf.training.optimizers import MasterAdamW
from tests.gloo import run_ranks

NEVER_CLIPS, CLIPS = 1e9, 0.01


class Net(nn.Module):
    """The head's bias cannot be cut, and one weight is in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 32).bfloat16()
        self.head = nn.Linear(32, 5).bfloat16()
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(x)) * self.scale[:32].bfloat16())


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def optimizer_of(model: nn.Module, kernels: str) -> MasterAdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return MasterAdamW(groups, lr=0.01, kernels=kernels)


def replica_of(
    model: nn.Module, optimizer: MasterAdamW, cut: bool, group: dist.ProcessGroup | None = None
) -> DataParallel:
    if cut:
        optimizer.step_in_parts(ReplicaParts(model.parameters(), group))
    return DataParallel(model, group, bucket_elements=300, parts=optimizer.parts)


def take_step(
    replica: DataParallel, optimizer: MasterAdamW, number: int, max_norm: float, spoilt=False
) -> torch.Tensor:
    """On other samples than other ranks, in two micro-batches; the norm."""
    replica.zero_grad()
    for micro in range(2):
        seed = 100 * dist.get_rank() + 10 * micro + number
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)).bfloat16()
        x = x.to(replica.module.scale.device)
        with replica.no_sync() if micro == 0 else torch.enable_grad():
            loss = replica(x).float().pow(2).mean()
            (loss * float("nan") if spoilt and dist.get_rank() == 1 else loss).backward()
    norm = optimizer.clip_in_step(max_norm)
    if norm is None:
        norm = torch.nn.utils.clip_grad_norm_(replica.parameters(), max_norm)
    optimizer.step()
    return norm


def stepped(
    rank: int, cut: bool, kernels: str, max_norm: float, on: torch.device | str = "cpu", group=None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights after some steps, and the norms."""
    fused_adamw.PIECE_ELEMENTS = 100  # several, of which one travels while the next is stepped
    model = net().to(on)
    optimizer = optimizer_of(model, kernels)
    replica = replica_of(model, optimizer, cut, group)
    norms = [take_step(replica, optimizer, number, max_norm).cpu() for number in range(4)]
    return [p.detach().cpu() for p in model.parameters()], norms


@pytest.mark.parametrize(("kernels", "world_size"), [("torch", 2), ("torch", 4), ("triton", 2)])
def test_parts_come_to_the_bits_of_wholes(kernels, world_size):
    whole, cut = (run_ranks(stepped, world_size, cut, kernels, NEVER_CLIPS) for cut in (False, True))
    for weights, norms in cut:
        assert all(map(torch.equal, weights, whole[0][0]))
        torch.testing.assert_close(norms, whole[0][1])
        assert norms == cut[0][1]


def test_parts_are_clipped_as_wholes():
    whole, cut = (run_ranks(stepped, 2, cut, "triton", CLIPS) for cut in (False, True))
    assert all(norm > CLIPS for norm in whole[0][1])
    for weights, norms in cut:
        torch.testing.assert_close(norms, whole[0][1])
        torch.testing.assert_close(weights, whole[0][0], rtol=1e-2, atol=1e-4)
    assert all(map(torch.equal, cut[0][0], cut[1][0]))


def spoilt_step(rank: int) -> bool:
    model = net()
    optimizer = optimizer_of(model, "torch")
    replica = replica_of(model, optimizer, cut=True)
    take_step(replica, optimizer, 0, CLIPS)
    before = [p.detach().clone() for p in model.parameters()]
    norm = take_step(replica, optimizer, 1, CLIPS, spoilt=True)
    return bool(norm.isnan()) and all(map(torch.equal, before, model.parameters()))


def test_a_step_that_is_not_finite_on_one_replica_changes_nothing_on_any():
    assert run_ranks(spoilt_step, 2) == [True, True]


def held(rank: int) -> dict[str, float]:
    """Elements of state by what they are of, and the share that is cut."""
    model = net()
    optimizer = optimizer_of(model, "torch")
    replica = replica_of(model, optimizer, cut=True)
    take_step(replica, optimizer, 0, NEVER_CLIPS)
    mine = optimizer.parts
    state = {name: optimizer.state[mine.of(p)]["exp_avg"].numel() for name, p in model.named_parameters()}
    return {**state, "share": mine.share_cut}


def test_each_replica_keeps_the_state_of_its_parts():
    wanted = {"body.weight": 256, "body.bias": 16, "head.weight": 80, "head.bias": 5, "scale": 32, "share": 768 / 773}
    assert run_ranks(held, 2) == [wanted, wanted]


def moved(rank: int) -> str:
    model = net()
    mine = ReplicaParts(model.parameters())
    model.body.weight.data = model.body.weight.detach().clone()
    try:
        mine.gather()
    except AssertionError as error:
        return str(error)
    return "gathered"


def test_a_parameter_that_has_moved_is_noticed():
    assert set(run_ranks(moved, 2)) == {"a parameter has moved since it was cut"}


def first_and_second(rank: int) -> list[torch.Tensor]:
    model = net()
    mine = ReplicaParts(model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            mine.of(parameter).fill_(rank if isinstance(mine.of(parameter), ParameterPart) else 7)
    mine.gather()
    return [p.detach().float() for p in model.parameters()]


def test_gathered_parts_lie_in_the_order_of_the_ranks():
    for weights in run_ranks(first_and_second, 2):
        for weight in weights:
            flat = weight.flatten()
            if flat.numel() == 5:
                assert (flat == 7).all()
            else:
                assert (flat.view(2, -1) == torch.tensor([[0.0], [1.0]])).all()


def test_pieces():
    tensors = [torch.empty(size) for size in (3, 4, 9, 1, 1)]
    assert [[t.numel() for t in piece] for piece in pieces_of(tensors, 7)] == [[3, 4], [9], [1, 1]]
    assert list(pieces_of([], 7)) == []
