"""Head and loss by powers on a GPU that quack is installed on, by each of its tiles, against fp64."""

import pytest
import torch
from torch.nn import functional as F

from neox_hf.kernels import fused_product, linear_cross_entropy, power_losses
from neox_hf.kernels.fused_product import TILES
from neox_hf.kernels.power_losses import POWER_TILES

HAS_QUACK = fused_product.quack_version() in fused_product.CHECKED_QUACK

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_QUACK, reason="its products are quack's")]

TOKENS, HIDDEN, WORDS, CHUNK = 4480, 520, 8448, 1664
"""No whole number of rows of a tile, neither in a chunk nor in the last one; nor a power of two of columns."""


def by_tile(monkeypatch, tile):
    monkeypatch.setattr(power_losses, "fused_tile", lambda *arguments: tile and TILES[tile])


@pytest.fixture(params=[1.0, 5.0, 40.0], ids=["near", "apart", "beyond fp32"])
def data(request):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, device="cuda").bfloat16()
    weight = (torch.randn(WORDS, HIDDEN, device="cuda") * request.param * HIDDEN**-0.5).bfloat16()
    labels = torch.randint(WORDS, (TOKENS,), device="cuda")
    labels[::7] = -100
    return hidden, weight, labels


def in_fp64(hidden, weight, labels, z_loss):
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    logits = leaves[0] @ leaves[1].t()
    loss = F.cross_entropy(logits, labels, reduction="sum") + z_loss * logits.logsumexp(1)[labels >= 0].square().sum()
    return loss.detach(), *torch.autograd.grad(loss / TOKENS, leaves)


def by_the_op(hidden, weight, labels, z_loss, upstream=1 / TOKENS):
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss = linear_cross_entropy(*leaves, labels, chunk=CHUNK, z_loss=z_loss, upstream=upstream)
    return loss.detach(), *torch.autograd.grad(loss / TOKENS, leaves)


def errors(found, exact):
    return torch.stack([(x.double() - y).norm() / y.norm() for x, y in zip(found, exact, strict=True)])


@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
@pytest.mark.parametrize("tile", POWER_TILES)
def test_no_further_from_the_truth_than_passes_over_logits(tile, z_loss, data, monkeypatch):
    exact = in_fp64(*data, z_loss)
    by_tile(monkeypatch, None)
    passes = errors(by_the_op(*data, z_loss), exact)
    by_tile(monkeypatch, tile)
    for upstream in (1 / TOKENS, None):
        ours = errors(by_the_op(*data, z_loss, upstream), exact)
        assert (ours <= 1.05 * passes + 1e-6).all(), (ours, passes)
        assert (ours <= 4e-3).all(), ours


def test_the_same_bits_again_and_in_a_graph(data, monkeypatch):
    by_tile(monkeypatch, POWER_TILES[0])
    first = [x.clone() for x in by_the_op(*data, 0.0)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = by_the_op(*data, 0.0)
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(first, found, strict=True))
