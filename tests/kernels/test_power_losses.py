"""Head and loss by powers: against fp64, against passes over logits, and where powers leave the range of fp32."""

import pytest
import torch
from torch.nn import functional as F

from neox_hf.kernels import fused_product, linear_cross_entropy, power_losses
from neox_hf.kernels.fused_product import TILES
from neox_hf.kernels.power_losses import POWER_TILES
from tests.kernels.quack_stand_in import Epilogues

TOKENS, HIDDEN, WORDS, CHUNK = 140, 24, 384, 128
"""Two chunks, for the interpreter takes 25 ms a token."""


@pytest.fixture(params=POWER_TILES)
def powers(request, monkeypatch):
    """quack's products of one tile, stood in for; what is asked of them."""
    ends = Epilogues()
    monkeypatch.setattr(power_losses, "epilogues", lambda: ends)
    monkeypatch.setattr(power_losses, "is_chosen", lambda backend, a, b: True)
    monkeypatch.setattr(power_losses, "fused_tile", lambda *arguments: TILES[request.param])
    return ends.powers


whatever_the_tile = pytest.mark.parametrize("powers", POWER_TILES[:1], indirect=True)


def inputs(tokens=TOKENS, words=WORDS, spread=2.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=draw).bfloat16()
    weight = (torch.randn(words, HIDDEN, generator=draw) * spread * HIDDEN**-0.5).bfloat16()
    labels = torch.randint(words, (tokens,), generator=draw)
    labels[3:7] = -100
    return hidden, weight, labels


def in_fp64(hidden, weight, labels, z_loss=0.0):
    """Loss and gradients, written out."""
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    logits = leaves[0] @ leaves[1].t()
    total = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    total = total + z_loss * logits.logsumexp(1)[labels != -100].square().sum()
    return total.detach(), *torch.autograd.grad(total, leaves)


def by_the_op(hidden, weight, labels, *, wide=True, factor=1.0, **options):
    hidden, weight = (torch.nn.Parameter(x.clone()) for x in (hidden, weight))
    if wide:
        hidden.grad_dtype = weight.grad_dtype = torch.float32
    options.setdefault("chunk", CHUNK)
    loss = linear_cross_entropy(hidden, weight, labels, backend="triton", **options)
    (loss * factor).backward()
    return loss.detach(), hidden.grad, weight.grad


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("spread", "z_loss"), [(0.1, 0.0), (2.0, 0.0), (2.0, 1e-3), (12.0, 1e-3)])
def test_is_nearer_to_the_truth_than_passes_over_rounded_logits(spread, z_loss, powers, monkeypatch):
    data = inputs(spread=spread)
    truth = in_fp64(*data, z_loss)
    found = by_the_op(*data, z_loss=z_loss)
    assert len(powers.tiles) == 2
    monkeypatch.setattr(power_losses, "is_chosen", lambda backend, a, b: False)
    passes = by_the_op(*data, z_loss=z_loss)
    assert len(powers.tiles) == 2
    for ours, theirs, exact in zip(found, passes, truth, strict=True):
        assert error(ours, exact) <= 1.05 * error(theirs, exact) + 1e-6
        assert error(ours, exact) < 4e-3


@whatever_the_tile
@pytest.mark.parametrize("promised", [True, False])
def test_a_factor_that_is_known_beforehand_is_in_the_gradients(promised, powers):
    data, factor = inputs(), 1 / 3
    options = {"upstream": factor} if promised else {}
    loss, for_hidden, for_weight = by_the_op(*data, wide=False, factor=factor, **options)
    truth = in_fp64(*data)
    assert error(loss, truth[0]) < 1e-6
    assert for_hidden.dtype == for_weight.dtype == torch.bfloat16
    assert error(for_hidden, truth[1] * factor) < 4e-3  # the interpreter cuts off where a GPU rounds
    assert error(for_weight, truth[2] * factor) < 3e-3


@whatever_the_tile
def test_gradients_are_added_to_what_is_there(powers):
    hidden, weight, labels = inputs()
    into = torch.ones(weight.shape)
    loss = linear_cross_entropy(
        hidden, weight.requires_grad_(), labels, chunk=CHUNK, upstream=0.5, accumulate_into=into, backend="triton"
    )
    (loss * 0.5).backward()
    assert weight.grad is None
    assert error(into - 1, in_fp64(hidden, weight.detach(), labels)[2] * 0.5) < 4e-3


def test_words_much_likelier_than_the_label(powers):
    """Their powers are beyond fp32, and beyond what its products can sum."""
    hidden, weight, labels = inputs(spread=40.0)
    losses = F.cross_entropy(hidden.double() @ weight.double().t(), labels, reduction="none", ignore_index=-100)
    assert (losses > 70).sum() > 10
    assert ((losses > 0) & (losses < 60)).sum() > 10
    hidden[0] *= 20
    for ours, exact in zip(by_the_op(hidden, weight, labels), in_fp64(hidden, weight, labels), strict=True):
        assert error(ours, exact) < 4e-3


def test_a_label_that_is_as_good_as_certain(powers):
    """Its probability is 1 - 1e-4; what is left of the gradient is not lost to rounding."""
    hidden = torch.eye(HIDDEN).bfloat16()
    weight = torch.zeros(WORDS, HIDDEN).bfloat16()
    weight[:HIDDEN] = 15 * torch.eye(HIDDEN)
    labels = torch.arange(HIDDEN)
    for ours, exact in zip(by_the_op(hidden, weight, labels), in_fp64(hidden, weight, labels), strict=True):
        assert error(ours, exact) < 5e-3
    assert by_the_op(hidden, weight, labels)[0] >= 0


@whatever_the_tile
def test_ignored_tokens_and_labels_that_are_no_word(powers):
    hidden, weight, labels = inputs()
    loss, for_hidden, for_weight = by_the_op(hidden, weight, torch.full_like(labels, -100))
    assert loss == 0
    assert not for_hidden.any()
    assert not for_weight.any()
    labels[0] = WORDS
    assert by_the_op(hidden, weight, labels)[0].isnan()
    _, for_hidden, _ = by_the_op(hidden, weight, labels.clamp(max=9), ignore_index=9)
    assert not for_hidden[labels >= 9].any()


@whatever_the_tile
def test_words_that_begin_later(powers):
    hidden, weight, labels = inputs()
    moved = labels.where(labels == -100, labels + 1000)
    for one, other in zip(
        by_the_op(hidden, weight, labels), by_the_op(hidden, weight, moved, first_row=1000), strict=True
    ):
        assert torch.equal(one, other)


@whatever_the_tile
def test_what_is_not_finite_is_seen(powers):
    hidden, weight, labels = inputs()
    weight[5, 3] = torch.nan
    assert by_the_op(hidden, weight, labels)[0].isnan()


@whatever_the_tile
@pytest.mark.parametrize("frozen", [0, 1])
def test_one_gradient_alone(frozen, powers):
    data = inputs()
    both = by_the_op(*data)
    leaves = [x.clone().requires_grad_(place != frozen) for place, x in enumerate(data[:2])]
    for leaf in leaves:
        leaf.grad_dtype = torch.float32
    linear_cross_entropy(*leaves, data[2], chunk=CHUNK, backend="triton").backward()
    assert leaves[frozen].grad is None
    assert torch.equal(leaves[1 - frozen].grad, both[2 - frozen])


@whatever_the_tile
def test_evaluation(powers):
    data = inputs()
    with torch.no_grad():
        loss = linear_cross_entropy(*data, chunk=CHUNK, backend="triton")
    assert torch.equal(loss, by_the_op(*data)[0])
    assert len(powers.tiles) == 4


def alone(tensor):
    """The reduction over one rank."""


@whatever_the_tile
@pytest.mark.parametrize(
    ("words", "dtype", "options"),
    [
        (200, torch.bfloat16, {}),
        (WORDS, torch.float32, {}),
        (WORDS, torch.bfloat16, {"chunk": 100}),
        (WORDS, torch.bfloat16, {"rows": WORDS - 1}),
        (WORDS, torch.bfloat16, {"all_max": alone, "all_sum": alone}),
    ],
)
def test_where_passes_over_logits_are_the_only_way(words, dtype, options, powers):
    hidden, weight, labels = inputs(words=words)
    linear_cross_entropy(hidden.to(dtype), weight.to(dtype), labels, backend="triton", **({"chunk": CHUNK} | options))
    assert not powers.tiles


@pytest.fixture
def asked(monkeypatch):
    """What a choice by time is asked about."""
    asked = []

    def fused_tile(product, operands, sizes, apart, fused):
        asked.append((product.name, product.tiles, sizes, apart(), [fused(TILES[text]) for text in product.tiles]))

    monkeypatch.setattr(power_losses, "fused_tile", fused_tile)
    return asked


@whatever_the_tile
@pytest.mark.parametrize(("words", "tiles"), [(384, POWER_TILES), (256, POWER_TILES[:1]), (192, POWER_TILES[1:])])
def test_what_is_compared_for_a_choice(words, tiles, powers, asked):
    hidden, weight, labels = inputs(words=words)
    linear_cross_entropy(hidden, weight, labels, chunk=CHUNK, upstream=0.25, backend="triton")
    ((name, tried, sizes, apart, fused),) = asked
    assert (name, tried, sizes) == ("product, powers of logits", tiles, (CHUNK, HIDDEN, words))
    for results in fused:
        for ours, theirs in zip(results, apart, strict=True):
            assert fused_product.relative_distance(ours, theirs) < fused_product.FAR_APART
