"""Where ranks of a tensor group meet: values and gradients of each place, on two ranks and on one."""

import pytest
import torch
from torch import Tensor

from neox_hf.errors import TopologyError
from neox_hf.parallel import ALONE, TensorRegion, Topology
from tests.gloo import run_ranks
from tests.parallel.regions import region_of

SHAPE = (2, 6, 3)


def draw(rank: int, salt: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Numbers of one rank, known to the other."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(10 * salt + rank))


def through(function, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """What `function` makes of x, and of a gradient on the way back."""
    x = x.clone().requires_grad_()
    made = function(x)
    made.backward(gradient)
    return made.detach(), x.grad


def every_place(rank: int) -> dict[str, tuple[Tensor, ...]]:
    region, scattered = region_of(rank), region_of(rank, sequence=True)
    whole, part = draw(rank, salt=1), draw(rank, salt=1, shape=(2, 3, 3))
    together = region.leave_together(draw(rank), draw(rank, salt=2))
    parameters = [draw(rank, shape=(3,)).requires_grad_(), draw(rank, salt=4, shape=(3,)).bfloat16().requires_grad_()]
    torch.cat([p.float() for p in region.shared(*parameters, None)[:2]]).backward(draw(rank, salt=5, shape=(6,)))
    return {
        "enter": through(region.enter, draw(rank), whole),
        "leave": through(region.leave, draw(rank), whole),
        "leave scattered": through(scattered.leave, draw(rank), part),
        "together": together,
        "gather": through(scattered.gather_sequence, draw(rank, shape=(2, 3, 3)), whole),
        "scatter": through(scattered.scatter_sequence, draw(rank), part),
        "shared": tuple(p.grad for p in parameters),
        "first only": through(region.first_only, draw(rank), whole),
        "reduced": (region.all_max_(draw(rank)), region.all_sum_(draw(rank))),
    }


def test_two_ranks():
    ranks = run_ranks(every_place, 2)
    total, gradients = draw(0) + draw(1), [draw(0, 1), draw(1, 1)]
    both = gradients[0] + gradients[1]
    parts = [draw(rank, 1, (2, 3, 3)) for rank in range(2)]
    joined = torch.cat(parts, dim=1)
    small = draw(0, 5, (6,)) + draw(1, 5, (6,))
    for rank, found in enumerate(ranks):
        mine = slice(3 * rank, 3 * rank + 3)
        wanted = {
            "enter": (draw(rank), both),
            "leave": (total, gradients[rank]),
            "leave scattered": (total[:, mine], joined),
            "together": (total + draw(0, 2) + draw(1, 2),),
            "gather": (torch.cat([draw(0, 0, (2, 3, 3)), draw(1, 0, (2, 3, 3))], dim=1), both[:, mine]),
            "scatter": (draw(rank)[:, mine], joined),
            "shared": (small[:3], small[3:].bfloat16()),
            "first only": (draw(0) if rank == 0 else torch.zeros(SHAPE), gradients[rank]),
            "reduced": (torch.maximum(draw(0), draw(1)), total),
        }
        for name, values in wanted.items():
            for value, same in zip(found[name], values, strict=True):
                torch.testing.assert_close(value, same, rtol=0, atol=1e-2 if value.dtype.itemsize == 2 else 1e-6)


def test_alone_everything_is_an_identity():
    assert TensorRegion.of(None) == TensorRegion.of(Topology.single()) == ALONE
    x = torch.randn(SHAPE)
    for function in (
        ALONE.enter, ALONE.leave, ALONE.gather_sequence, ALONE.scatter_sequence, ALONE.first_only, ALONE.all_max_,
        ALONE.all_sum_, ALONE.with_whole_sequence,
    ):  # fmt: skip
        assert function(x) is x
    assert ALONE.shared(x, None) == ALONE.leave_together(x, None) == (x, None)
    before = torch.get_rng_state()
    with ALONE.own_random(x.device), ALONE.residual_random(x.device):
        assert torch.equal(torch.get_rng_state(), before)


def test_sequence_parallelism_is_for_training():
    region = TensorRegion(size=2, rank=1, sequence=True)
    assert region.in_mode(training=True) is region
    assert region.in_mode(training=False) == TensorRegion(size=2, rank=1)
    assert region.with_whole_sequence(torch.zeros(SHAPE)).shape == (2, 12, 3)


def test_shares():
    assert TensorRegion(size=4).share(12, "heads") == 3
    with pytest.raises(TopologyError, match=r"heads=10 does not divide by parallel.tensor=4; .*fewer ranks: 1, 2$"):
        TensorRegion(size=4).share(10, "heads")


def scatter_five(rank: int) -> str:
    with pytest.raises(TopologyError) as raised:
        region_of(rank, sequence=True).scatter_sequence(torch.zeros(1, 5, 2))
    return str(raised.value)


def test_a_sequence_that_does_not_divide():
    for said in run_ranks(scatter_five, 2):
        assert said.startswith(
            "parallel.sequence is on, and the sequence length=5 does not divide by parallel.tensor=2"
        )


def test_a_region_without_its_group_sends_nothing():
    with pytest.raises(ValueError, match="process group has not been initialized"):
        TensorRegion(size=2).leave(torch.zeros(SHAPE))


def draws(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    region, device = region_of(rank), torch.device("cpu")
    torch.manual_seed(5)
    with region.own_random(device):
        first = torch.rand(4)
    with region.own_random(device):
        second = torch.rand(4)
    with region.own_random(device, probability=0.0), region.residual_random(device):
        pass  # neither draws anything
    return first, second, torch.rand(4)


def test_own_random_numbers():
    ranks = run_ranks(draws, 2)
    own = [tuple(numbers.tolist()) for rank in ranks for numbers in rank[:2]]
    assert len(set(own)) == 4, "every rank and every context has its own"
    torch.manual_seed(5)
    for _ in range(2):
        torch.randint(2**48, ())
    common = torch.rand(4)
    for _, _, after in ranks:
        assert torch.equal(after, common)


@pytest.mark.gpu
def test_own_random_numbers_of_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    drawn, after = [], []
    for rank in range(2):
        torch.manual_seed(5)
        with TensorRegion(size=2, rank=rank).own_random(device):
            drawn.append(torch.rand(4, device=device))
        after.append(torch.rand(4, device=device))
    torch.manual_seed(5)
    assert not torch.equal(*drawn)
    assert torch.equal(*after)
    assert torch.equal(after[0], torch.rand(4, device=device))
