"""Every op that has gradients, inputs for it, and what it and its gradients come to."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from neox_hf import kernels
from neox_hf.kernels.document_spans import spans_of_positions
from tests.kernels.layouts import laid_out
from tests.kernels.rotary_back_cases import angles

EPS, HEADS, WORDS = 1e-5, 2, 19


class Sizes(NamedTuple):
    """tokens: of each sample. width: of a row. head: of a row of each of `HEADS`."""

    batch: int = 3
    tokens: int = 5
    width: int = 12
    head: int = 8


class Sample(NamedTuple):
    """compute: an op of tensors that have gradients, and a backend. shapes: of those tensors."""

    compute: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    shapes: Callable[[Sizes], list[tuple[int, ...]]]


def of_rows(name: str, streams: int, affines: int, *settings: object) -> Sample:
    """An op of streams [B, S, H] and then parameters [H]."""

    def compute(*tensors, backend):
        return getattr(kernels, name)(*tensors, *settings, backend=backend)

    return Sample(compute, lambda n: [(n.batch, n.tokens, n.width)] * streams + [(n.width,)] * affines)


def heads(n):
    return [(n.batch, HEADS, n.tokens, n.head)] * 3


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
    "scale_norm": Sample(of_rows("scale_norm", 1, 0, EPS).compute, lambda n: [(n.batch, n.tokens, n.width), (1,)]),
    "rotary": Sample(rotary, lambda n: [(n.batch, n.tokens, HEADS, 3, n.head)]),
    "causal_attention": Sample(attention, heads),
    "document_attention": Sample(within_documents, heads),
    "bias_gelu_erf": of_rows("bias_gelu", 1, 1, "erf"),
    "bias_gelu_tanh": of_rows("bias_gelu", 1, 1, "tanh"),
    "residual_add": of_rows("residual_add", 3, 0),
    "bias_dropout_residual": Sample(
        residual, lambda n: [(n.batch, n.tokens, n.width), *[(n.batch, n.tokens, n.width), (n.width,)] * 2]
    ),
    "causal_softmax": Sample(softmax, lambda n: [(n.batch, HEADS, n.tokens, n.tokens)]),
    "cross_entropy": Sample(loss, lambda n: [(n.batch, n.tokens, WORDS)]),
    "linear_cross_entropy": Sample(head_and_loss, lambda n: [(n.batch * n.tokens, n.width), (WORDS, n.width)]),
    "embedding": Sample(look_up, lambda n: [(WORDS, n.width)]),
}

every_op = pytest.mark.parametrize("name", SAMPLES)


def inputs(name: str, sizes: Sizes = Sizes(), device: str = "cpu") -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw).to(device) for shape in SAMPLES[name].shapes(sizes)]


def results(compute: Callable, tensors: list[torch.Tensor], layout: str | None = None) -> list[torch.Tensor]:
    """Values and gradients in all tensors, of an upstream gradient that lies as `layout` says."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    values = compute(*leaves)
    values = values if isinstance(values, tuple) else (values,)
    draw = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=draw).bfloat16().to(y) for y in values]  # the same in every dtype
    if layout is not None:
        upstream = [laid_out(layout, dy) if dy.dim() else dy for dy in upstream]
    return [*(y.detach() for y in values), *torch.autograd.grad(values, leaves, upstream)]


def by(name: str, backend: str) -> Callable:
    return lambda *tensors: SAMPLES[name].compute(*tensors, backend=backend)


def check_layout(name: str, given: list[torch.Tensor], layout: str, backend: str, tolerance: float) -> None:
    """Values and gradients follow fp64's, to `tolerance` of their norm."""
    exact = results(by(name, "torch"), [x.double().contiguous() for x in given], layout)
    for place, (found, wanted) in enumerate(zip(results(by(name, backend), given, layout), exact, strict=True)):
        assert found.shape == wanted.shape
        assert (found.double() - wanted).norm() <= tolerance * wanted.norm() + 1e-5, (backend, place)
