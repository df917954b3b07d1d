"""The kernels of a layer at a recipe's sizes, for those passes whose launches can be chosen."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from neox_hf.kernels import (
    bias_dropout_residual,
    bias_gelu,
    document_attention,
    layer_norm,
    residual_dual_layer_norm,
    residual_layer_norm,
    rotary,
)
from neox_hf.kernels.column_sums import column_sums
from neox_hf.kernels.document_spans import DocumentSpans, spans_of_positions
from neox_hf.kernels.qkv_gradient import heads
from neox_hf.kernels.rotary_back import rotary_back_with_sums
from neox_hf.tuning.inputs import Random
from neox_hf.tuning.sizes import Sizes
from neox_hf.tuning.work import Call, Work, passes

EPS = 1e-5
DOCUMENT = 500
"""Tokens of a packed document."""


def layer_work(s: Sizes) -> list[Work]:
    """What takes longest first."""
    works = gelu_work, document_work, norm_work, residual_work, rotary_work, column_work
    return [each for work in works for each in work(s)]


def gelu_work(s: Sizes) -> Iterator[Work]:
    """With the bias, as training has it, and without."""
    if s.form is None:
        return

    def op(x: Tensor, bias: Tensor | None) -> Tensor:
        return bias_gelu(x, bias, s.form, backend="triton")

    def make(random: Random, biased: bool) -> tuple[list[Tensor | None], list[Tensor]]:
        x, dy = (random.values(s.product, s.tokens, s.inner) for _ in range(2))
        return [x, random.values(s.stream, s.inner) if biased else None], [dy]

    yield from passes("bias + GELU", op, lambda random: make(random, biased=True))
    yield from passes("GELU", op, lambda random: make(random, biased=False))


def document_work(s: Sizes) -> Iterator[Work]:
    """Attention within documents of `DOCUMENT` tokens."""
    if not s.documents:
        return

    @functools.cache
    def spans_on(device: torch.device) -> DocumentSpans:
        return spans_of_positions(torch.arange(s.sequence, device=device).remainder(DOCUMENT).expand(s.batch, -1))

    def op(query: Tensor, *rest: Tensor) -> Tensor:
        return document_attention(query, *rest, spans_on(query.device), scale=s.head_size**-0.5, backend="triton")

    def make(random: Random) -> tuple[list[Tensor | None], list[Tensor]]:
        qkv = random.values(s.product, s.batch, s.sequence, s.heads, 3, s.head_size)
        upstream = random.values(s.product, s.batch, s.sequence, s.heads, s.head_size)
        return list(heads(qkv)), [upstream]

    yield from passes("attention within documents", op, make)


def norm_work(s: Sizes) -> Iterator[Work]:
    """The norm that ends the model, and the block's beside the residual stream."""

    def make(random: Random, outputs: int, affines: int) -> tuple[list[Tensor | None], list[Tensor]]:
        parameters = [random.values(s.stream, s.hidden) for _ in range(2 * affines)]
        gradients = [random.values(s.stream, s.tokens, s.hidden) for _ in range(outputs)]
        return [random.values(s.stream, s.tokens, s.hidden), *parameters], gradients

    block, affines = (residual_dual_layer_norm, 2) if s.parallel_residual else (residual_layer_norm, 1)
    name = "two layer norms" if s.parallel_residual else "layer norm of the stream"
    yield from passes(
        name, lambda *given: block(*given, EPS, backend="triton"), lambda random: make(random, 1 + affines, affines)
    )
    yield from passes(
        "layer norm", lambda *given: layer_norm(*given, EPS, backend="triton"), lambda random: make(random, 1, 1)
    )


def residual_work(s: Sizes) -> Iterator[Work]:
    """The sum that closes a block; its backward pass does something only where there is dropout."""
    branches = 2 if s.parallel_residual else 1

    def prepared(random: Random) -> tuple[list[Tensor], list[Tensor]]:
        made = [random.values(s.stream, s.tokens, s.hidden)]
        for _ in range(branches):
            made += [random.values(s.product, s.tokens, s.hidden), random.values(s.stream, s.hidden)]
        return made, [random.values(s.stream, s.tokens, s.hidden)]

    def op(x: Tensor, *pairs: Tensor) -> Tensor:
        seed = torch.ones(1, dtype=torch.int64, device=x.device) if s.dropout else None
        return bias_dropout_residual(x, *(*pairs, None, None)[:4], s.dropout, seed, backend="triton")

    forward, backward = passes("bias + dropout + residual", op, prepared)
    yield forward
    if s.dropout:
        yield backward


def rotary_work(s: Sizes) -> Iterator[Work]:
    """In place, and where three gradients are put together."""
    if s.rotary == 0:
        return

    def angles(random: Random) -> tuple[Tensor, Tensor]:
        frequencies = 10000.0 ** (-torch.arange(0, s.rotary, 2, device=random.device) / s.rotary)
        turned = torch.outer(torch.arange(s.sequence, device=random.device).float(), frequencies)[None]
        return turned.cos(), turned.sin()

    def qkv_of(random: Random) -> Tensor:
        return random.values(s.product, s.batch, s.sequence, s.heads, 3, s.head_size)

    def in_place(random: Random) -> Call:
        qkv, turned = qkv_of(random), angles(random)
        return lambda: rotary(qkv, *turned, backend="triton")

    def back(random: Random) -> Call:
        qkv, turned = qkv_of(random).requires_grad_(), angles(random)
        bias = random.values(s.stream, qkv.shape[2:].numel()).requires_grad_() if s.attention_bias else None
        outputs = rotary(qkv, *turned, bias=bias, backend="triton")
        gradients = [random.values(s.product, *output.shape) for output in outputs]
        wanted = [qkv] if bias is None else [qkv, bias]
        return lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)

    def back_in_place(random: Random) -> Call:
        gradient, turned = qkv_of(random), angles(random)
        return lambda: (rotary_back_with_sums(gradient, *turned, torch.float32), gradient)

    yield Work("rotary in place", in_place)
    yield Work("rotary, gradients apart", back)
    if s.attention_bias:
        yield Work("rotary, gradients in one buffer", back_in_place)


def column_work(s: Sizes) -> Iterator[Work]:
    """The gradient of the biases of the residual's branches, which nothing else sums in passing."""

    def prepare(random: Random) -> Call:
        x = random.values(s.stream, s.tokens, s.hidden)
        return lambda: (column_sums(x, torch.float32),)

    yield Work(f"sums of {s.hidden} columns", prepare)
