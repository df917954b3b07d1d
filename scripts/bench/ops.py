"""Ops of a step: how each is called here, in torch and by Liger; what it has to do; what is owed on one H200."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from neox_hf import kernels
from neox_hf.kernels.document_spans import spans_of_positions
from neox_hf.kernels.qkv_gradient import HANDED_OVER, heads
from scripts.bench import liger
from scripts.bench.case import Case, streams, wides
from scripts.bench.floors import HEAD_PRODUCTS, PRODUCTS, Shapes, Work
from scripts.bench.inputs import Inputs, Random

EPS = 1e-5
DOCUMENT = 500
"""Tokens of a packed document."""


def norm_inputs(s: Shapes, random: Random, rows: int, affines: int, outputs: int) -> Inputs:
    arguments = [random.leaf(s.tokens, s.hidden) for _ in range(rows)]
    arguments += [random.leaf(s.hidden) for _ in range(2 * affines)]
    return Inputs(tuple(arguments), tuple(random.values(s.tokens, s.hidden) for _ in range(outputs)))


def torch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def torch_dual_norm(x: Tensor, *affines: Tensor) -> tuple[Tensor, Tensor]:
    return torch_norm(x, *affines[:2]), torch_norm(x, *affines[2:])


def torch_sum_and_norms(x: Tensor, first: Tensor, second: Tensor, *affines: Tensor) -> tuple[Tensor, ...]:
    total = second + first + x
    return total, *torch_dual_norm(total, *affines)


NORMS = (
    Case(
        "layer norm",
        make=lambda s, r: norm_inputs(s, r, 1, 1, 1),
        torch=torch_norm,
        ours=lambda *a, backend: kernels.layer_norm(*a, EPS, backend=backend),
        forward=streams(2),
        both=streams(5),
        targets=(0.036, 0.100),
        liger=liger.layer_norm,
    ),
    Case(
        "dual layer norm",
        make=lambda s, r: norm_inputs(s, r, 1, 2, 2),
        torch=torch_dual_norm,
        ours=lambda *a, backend: kernels.dual_layer_norm(*a, EPS, backend=backend),
        forward=streams(3),
        both=streams(7),
        targets=(0.052, 0.140),
    ),
    Case(
        "residual + dual layer norm",
        make=lambda s, r: norm_inputs(s, r, 3, 2, 3),
        torch=torch_sum_and_norms,
        ours=lambda *a, backend: kernels.add_dual_layer_norm(*a, EPS, backend=backend),
        forward=streams(6),
        both=streams(11),
        targets=(0.102, 0.205),
    ),
)


def qkv(s: Shapes, random: Random, scale: float = 1.0) -> Tensor:
    return random.values(s.batch, s.sequence, s.heads, 3, s.head_size, scale=scale)


def rotary_inputs(s: Shapes, random: Random, *, one_buffer: bool) -> Inputs:
    """one_buffer: the gradients of query, key and value lie in one buffer, which the op may turn in place."""
    frequencies = 10000.0 ** (-torch.arange(0, s.rotary, 2, device=random.device) / s.rotary)
    angles = torch.outer(torch.arange(s.sequence, device=random.device).float(), frequencies)[None]
    gradients = qkv(s, random)
    if one_buffer:
        setattr(gradients, HANDED_OVER, True)
        parts = heads(gradients)
    else:
        parts = tuple(part.contiguous() for part in heads(gradients))
    return Inputs((qkv(s, random).requires_grad_(), angles.cos(), angles.sin()), parts, made=True)


def stock_rotary(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """As transformers does it: on views of the projection, out of place."""
    query, key, value = qkv.flatten(3).transpose(1, 2).chunk(3, dim=-1)
    angles = (torch.cat((x, x), dim=-1).to(qkv.dtype) for x in (cos, sin))
    return *apply_rotary_pos_emb(query, key, *angles), value


ROTARY = (
    Case(
        "partial rotary",
        make=lambda s, r: rotary_inputs(s, r, one_buffer=True),
        torch=stock_rotary,
        ours=lambda *a, backend: kernels.rotary(*a, backend=backend),
        forward=lambda s: Work(moved=s.rotated),
        both=lambda s: Work(moved=2 * s.rotated),
        targets=(0.030, 0.065),
    ),
    Case(
        "partial rotary, gradients apart",
        make=lambda s, r: rotary_inputs(s, r, one_buffer=False),
        torch=stock_rotary,
        ours=lambda *a, backend: kernels.rotary(*a, backend=backend),
        forward=lambda s: Work(moved=s.rotated),
        both=lambda s: Work(moved=s.rotated + 6 * s.stream),
    ),
)


def attention_inputs(s: Shapes, random: Random) -> Inputs:
    """Query, key and value as views of the projection's output."""
    parts = tuple(part.detach().requires_grad_() for part in heads(qkv(s, random)))
    return Inputs(parts, (random.values(s.batch, s.sequence, s.heads, s.head_size),))


def attention_work(s: Shapes, passes: float) -> Work:
    return Work(flops=passes * 2 * s.batch * s.heads * s.sequence**2 * s.head_size)


def document_inputs(s: Shapes, random: Random) -> Inputs:
    """As for attention, each sample packed with documents of `DOCUMENT` tokens."""
    positions = torch.arange(s.sequence, device=random.device).remainder(DOCUMENT).expand(s.batch, -1)
    whole = attention_inputs(s, random)
    return Inputs((*whole.arguments, spans_of_positions(positions)), whole.gradients)


def document_work(s: Shapes, passes: float) -> Work:
    whole, rest = divmod(s.sequence, DOCUMENT)
    return Work(flops=passes * 2 * s.batch * s.heads * (whole * DOCUMENT**2 + rest**2) * s.head_size)


ATTENTION = (
    Case(
        "causal attention",
        make=attention_inputs,
        torch=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2),
        ours=lambda q, *kv, backend: kernels.causal_attention(q, *kv, scale=q.shape[-1] ** -0.5, backend=backend),
        forward=lambda s: attention_work(s, 1),
        both=lambda s: attention_work(s, 3.5),
        timed=("ours", "torch"),
    ),
    Case(
        "attention within documents",
        make=document_inputs,
        torch=lambda q, k, v, spans: kernels.DOCUMENT_ATTENTION.torch(q, k, v, spans, q.shape[-1] ** -0.5),
        ours=lambda q, *rest, backend: kernels.document_attention(q, *rest, scale=q.shape[-1] ** -0.5, backend=backend),
        forward=lambda s: document_work(s, 1),
        both=lambda s: document_work(s, 3.5),
        timed=("ours", "torch"),
    ),
)


def activation_inputs(s: Shapes, random: Random) -> Inputs:
    return Inputs((random.leaf(s.tokens, s.inner), random.leaf(s.inner)), (random.values(s.tokens, s.inner),))


def mlp_inputs(s: Shapes, random: Random) -> Inputs:
    arguments = (random.leaf(s.tokens, s.hidden), random.leaf(s.inner, s.hidden, scale=0.02), random.leaf(s.inner))
    return Inputs(arguments, (random.values(s.tokens, s.inner),))


def products(count: int, rate: float = PRODUCTS) -> Callable[[Shapes], Work]:
    return lambda s: Work(flops=count * 2 * s.tokens * s.hidden * s.inner, rate=rate)


ACTIVATIONS = (
    Case(
        "GELU",
        make=lambda s, r: Inputs((r.leaf(s.tokens, s.inner),), (r.values(s.tokens, s.inner),)),
        torch=F.gelu,
        ours=lambda x, backend: kernels.bias_gelu(x, None, "erf", backend=backend),
        forward=wides(2),
        both=wides(5),
        targets=(0.138, 0.345),
    ),
    Case(
        "bias + GELU",
        make=activation_inputs,
        torch=lambda x, bias: F.gelu(x + bias),
        ours=lambda x, bias, backend: kernels.bias_gelu(x, bias, "erf", backend=backend),
        forward=wides(2),
        both=wides(5),
        targets=(0.140, 0.370),
    ),
    Case(
        "linear + bias + GELU",
        make=mlp_inputs,
        torch=lambda x, weight, bias: F.gelu(F.linear(x, weight, bias)),
        ours=lambda x, weight, bias, backend: kernels.linear_gelu(x, weight, bias, "erf", backend=backend),
        forward=products(1),
        both=products(3),
        targets=(0.880, 2.60),
    ),
)


def loss_inputs(s: Shapes, random: Random) -> Inputs:
    labels = random.words(s.tokens, s.vocabulary)
    return Inputs((random.leaf(s.tokens, s.vocabulary), labels), (torch.ones((), device=random.device),))


def own_loss(logits: Tensor, labels: Tensor, backend: str) -> Tensor:
    counted = labels.numel()
    return kernels.cross_entropy(
        logits[None], None, shift_labels=labels[None], num_items_in_batch=counted, backend=backend
    )


def head_inputs(s: Shapes, random: Random, *, wide_gradient: bool = False) -> Inputs:
    hidden, weight = random.leaf(s.tokens, s.hidden), random.leaf(s.vocabulary, s.hidden, scale=0.02)
    if wide_gradient:
        weight.grad_dtype = torch.float32
    labels = random.words(s.tokens, s.vocabulary)
    return Inputs((hidden, weight, labels), (torch.ones((), device=random.device),))


def stock_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As transformers does it; `float()` leaves fp64 alone."""
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


def own_head(hidden: Tensor, weight: Tensor, labels: Tensor, backend: str, **form: Any) -> Tensor:
    """As the model does it, which knows the number of labels beforehand."""
    count = labels.numel()
    return kernels.linear_cross_entropy(hidden, weight, labels, upstream=1 / count, backend=backend, **form) / count


def head_products(count: int) -> Callable[[Shapes], Work]:
    return lambda s: Work(flops=count * 2 * s.tokens * s.hidden * s.vocabulary, rate=HEAD_PRODUCTS)


LOSSES = (
    Case(
        "cross-entropy",
        make=loss_inputs,
        torch=F.cross_entropy,
        ours=own_loss,
        forward=lambda s: Work(moved=s.logits),
        both=lambda s: Work(moved=2 * s.logits),
        targets=(None, 1.25),
        compiled=lambda logits, labels: F.cross_entropy(logits.float(), labels),
        liger=liger.cross_entropy,
    ),
    Case(
        "linear + cross-entropy",
        make=head_inputs,
        torch=stock_head,
        ours=own_head,
        forward=head_products(1),
        both=head_products(3),
        targets=(None, 15.2),
        most_gib=0.6,
        liger=liger.linear_cross_entropy,
    ),
    Case(
        "linear + cross-entropy, fp32 weight gradient",
        make=lambda s, r: head_inputs(s, r, wide_gradient=True),
        torch=stock_head,
        ours=own_head,
        forward=head_products(1),
        both=head_products(3),
        targets=(None, 15.5),
        liger=lambda: liger.linear_cross_entropy(torch.float32),
        timed=("ours", "liger"),
    ),
)

OWED: tuple[Case, ...] = (*NORMS, *ROTARY, *ATTENTION, *ACTIVATIONS, *LOSSES)
