"""What holds of every op that has gradients: inputs and upstream gradients may lie in memory as they like, be empty, be
on meta, and be seen by a compiler whose sizes vary."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from neox_hf import kernels
from neox_hf.kernels.document_spans import spans_of_positions
from tests.kernels.layouts import LAYOUTS, far_apart, laid_out
from tests.kernels.rotary_back_cases import angles

EPS, WIDTH, HEADS, SIZE, WORDS = 1e-5, 12, 2, 8, 19


class Sample(NamedTuple):
    """compute: an op of tensors that have gradients, and a backend. shapes: of those tensors, for a batch of samples
    and their tokens."""

    compute: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    shapes: Callable[[int, int], list[tuple[int, ...]]]


def of_rows(name: str, streams: int, affines: int, *settings: object) -> Sample:
    """An op of streams [B, S, H] and then parameters [H]."""

    def compute(*tensors, backend):
        return getattr(kernels, name)(*tensors, *settings, backend=backend)

    return Sample(compute, lambda batch, tokens: [(batch, tokens, WIDTH)] * streams + [(WIDTH,)] * affines)


def heads(batch, tokens):
    return [(batch, HEADS, tokens, SIZE)] * 3


def rotary(qkv, *, backend):
    cos, sin = angles(qkv.shape[1], 4, 1, qkv.device)
    return kernels.rotary(qkv, cos.float(), sin.float(), backend=backend)


def attention(*qkv, backend):
    return kernels.causal_attention(*qkv, scale=0.3, backend=backend)


def within_documents(*qkv, backend):
    batch, _, tokens, _ = qkv[0].shape
    spans = spans_of_positions((torch.arange(tokens, device=qkv[0].device) % 3).expand(batch, tokens))
    return kernels.document_attention(*qkv, spans, scale=0.3, backend=backend)


def residual(x, first, bias1, second, bias2, *, backend):
    return kernels.bias_dropout_residual(x, first, bias1, second, bias2, backend=backend)


def softmax(scores, *, backend):
    mask = torch.linspace(-1, 1, scores.shape[-1] ** 2, device=scores.device).view(1, 1, *scores.shape[2:])
    return kernels.causal_softmax(scores, 0.3, mask.mT.to(scores.dtype), backend=backend)


def words(tokens, device):
    """Every other number of a tensor."""
    return (torch.arange(2 * tokens, device=device) * 7 % WORDS)[::2]


def loss(logits, *, backend):
    labels = words(logits.shape[0] * logits.shape[1], logits.device).view(logits.shape[:2])
    return kernels.cross_entropy(logits, labels, z_loss=1e-2, backend=backend)


def head_and_loss(hidden, weight, *, backend):
    labels = words(hidden.shape[0], hidden.device)
    return kernels.linear_cross_entropy(hidden, weight, labels, chunk=5, upstream=1.0, backend=backend)


def look_up(weight, *, backend):
    return kernels.embedding(words(9, weight.device), weight, backend=backend)


SAMPLES = {
    "layer_norm": of_rows("layer_norm", 1, 2, EPS),
    "residual_layer_norm": of_rows("residual_layer_norm", 1, 2, EPS),
    "add_layer_norm": of_rows("add_layer_norm", 3, 2, EPS),
    "dual_layer_norm": of_rows("dual_layer_norm", 1, 4, EPS),
    "residual_dual_layer_norm": of_rows("residual_dual_layer_norm", 1, 4, EPS),
    "add_dual_layer_norm": of_rows("add_dual_layer_norm", 3, 4, EPS),
    "rms_norm": of_rows("rms_norm", 1, 1, EPS),
    "scale_norm": Sample(
        of_rows("scale_norm", 1, 0, EPS).compute, lambda batch, tokens: [(batch, tokens, WIDTH), (1,)]
    ),
    "rotary": Sample(rotary, lambda batch, tokens: [(batch, tokens, HEADS, 3, SIZE)]),
    "causal_attention": Sample(attention, heads),
    "document_attention": Sample(within_documents, heads),
    "bias_gelu_erf": of_rows("bias_gelu", 1, 1, "erf"),
    "bias_gelu_tanh": of_rows("bias_gelu", 1, 1, "tanh"),
    "residual_add": of_rows("residual_add", 3, 0),
    "bias_dropout_residual": Sample(
        residual, lambda batch, tokens: [(batch, tokens, WIDTH), *[(batch, tokens, WIDTH), (WIDTH,)] * 2]
    ),
    "causal_softmax": Sample(softmax, lambda batch, tokens: [(batch, HEADS, tokens, tokens)]),
    "cross_entropy": Sample(loss, lambda batch, tokens: [(batch, tokens, WORDS)]),
    "linear_cross_entropy": Sample(head_and_loss, lambda batch, tokens: [(batch * tokens, WIDTH), (WORDS, WIDTH)]),
    "embedding": Sample(look_up, lambda batch, tokens: [(WORDS, WIDTH)]),
}

every_op = pytest.mark.parametrize("name", SAMPLES)


def inputs(name: str, batch: int = 3, tokens: int = 5) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw) for shape in SAMPLES[name].shapes(batch, tokens)]


def results(compute: Callable, tensors: list[torch.Tensor], layout: str | None = None) -> list[torch.Tensor]:
    """Values and gradients in all tensors, of an upstream gradient that lies as `layout` says."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    values = compute(*leaves)
    values = values if isinstance(values, tuple) else (values,)
    upstream = [torch.linspace(1, 2, y.numel()).to(y).view_as(y) for y in values]
    if layout is not None:
        upstream = [laid_out(layout, dy) if dy.dim() else dy for dy in upstream]
    return [*(y.detach() for y in values), *torch.autograd.grad(values, leaves, upstream)]


def by(name: str, backend: str) -> Callable:
    return lambda *tensors: SAMPLES[name].compute(*tensors, backend=backend)


@every_op
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_may_lie_in_memory_as_they_like(name, layout):
    given = [laid_out(layout, x) for x in inputs(name)]
    exact = results(by(name, "torch"), [x.double().contiguous() for x in given], layout)
    for backend in ("triton", "torch"):
        for place, (found, wanted) in enumerate(zip(results(by(name, backend), given, layout), exact, strict=True)):
            assert found.shape == wanted.shape
            assert (found.double() - wanted).norm() <= 2e-5 * wanted.norm() + 1e-5, (backend, place)


@every_op
@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (3, 0)])
def test_nothing_may_be_given(name, batch, tokens):
    given = inputs(name, batch, tokens)
    for found, wanted in zip(*(results(by(name, backend), given) for backend in ("triton", "torch")), strict=True):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert torch.equal(found, wanted)


@every_op
def test_on_meta_there_are_shapes(name):
    given = inputs(name)
    for found, wanted in zip(
        results(by(name, "triton"), [x.to("meta") for x in given]), results(by(name, "torch"), given), strict=True
    ):
        assert (found.shape, found.dtype, found.device.type) == (wanted.shape, wanted.dtype, "meta")


@every_op
def test_a_compiler_takes_it_whole_at_sizes_that_vary(name):
    torch._dynamo.reset()
    compiled = torch.compile(by(name, "triton"), fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, tokens, layout in [(3, 5, "stepped"), (2, 7, "transposed")]:
        given = [laid_out(layout, x) for x in inputs(name, batch, tokens)]
        for found, wanted in zip(results(compiled, given), results(by(name, "torch"), given), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_mask_with_rows_far_apart():
    scores, mask = torch.randn(1, 1, 3, 4).bfloat16(), torch.randn(1, 1, 3, 4).bfloat16()
    near, far = (kernels.causal_softmax(scores, 0.3, each, backend="triton") for each in (mask, far_apart(mask, 2)))
    assert torch.equal(near, far)


def test_rotary_takes_gradients_whose_heads_are_far_apart():
    (qkv,) = inputs("rotary")
    upstream = [torch.randn(qkv.shape[0], HEADS, qkv.shape[1], SIZE).bfloat16() for _ in range(3)]
    found = []
    for given in (upstream, [far_apart(upstream[0].transpose(0, 1), 0).transpose(0, 1), *upstream[1:]]):
        leaf = qkv.bfloat16().requires_grad_()
        found.append(*torch.autograd.grad(rotary(leaf, backend="triton"), leaf, given))
    assert torch.equal(*found)
