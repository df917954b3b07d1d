"""The products of a step at a recipe's sizes, each computed once: where algorithms are chosen, that measures them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from neox_hf.kernels import linear_cross_entropy
from neox_hf.kernels.gelu_product import gelu_product, gelu_product_backward
from neox_hf.kernels.product import linear_product
from neox_hf.kernels.residual_product import residual_product
from neox_hf.kernels.weight_gradient import add_product_
from neox_hf.tuning.inputs import Random
from neox_hf.tuning.sizes import Sizes


class LinearSizes(NamedTuple):
    """biased: the product adds the bias; else a kernel behind it does."""

    outputs: int
    inputs: int
    biased: bool


def linears_of(s: Sizes) -> Iterator[LinearSizes]:
    """Those of a block."""
    attended = s.heads * s.head_size
    yield LinearSizes(3 * attended, s.hidden, s.attention_bias)
    yield LinearSizes(s.hidden, attended, False)
    yield LinearSizes(s.inner, s.hidden, False)
    yield LinearSizes(s.hidden, s.inner, False)


def compute_mlp(s: Sizes, random: Random) -> None:
    """The products of the feed-forward half that may go on with what comes next."""
    stream, branch, dout = (random.values(s.product, s.tokens, s.hidden) for _ in range(3))
    up = random.values(s.product, s.inner, s.hidden, scale=s.hidden**-0.5)
    down = random.values(s.product, s.hidden, s.inner, scale=s.inner**-0.5)
    up_bias, *biases = (random.values(s.product, size) for size in (s.inner, s.hidden, s.hidden))
    z, y = gelu_product(stream, up, up_bias, s.form, "auto")
    residual_product(y, down, stream, branch, *biases, "auto")
    for again in (False, True):
        gelu_product_backward(dout, down, z, up_bias, s.form, s.gradient, again, "auto")


def compute_products(s: Sizes, random: Random) -> None:
    """The three products of each linear, what may follow them, and the products of a head that is not split."""
    for outputs, inputs, biased in linears_of(s):
        x, dy = (random.values(s.product, s.tokens, columns) for columns in (inputs, outputs))
        weight = random.values(s.product, outputs, inputs, scale=inputs**-0.5)
        linear_product(x, weight, random.values(s.product, outputs) if biased else None)
        linear_product(dy, weight.t())
        add_product_(torch.empty(outputs, inputs, device=x.device, dtype=s.gradient), dy, x, keep=False)
    if s.mlp_is_one_node:
        compute_mlp(s, random)
    if s.vocabulary is not None:
        hidden = random.values(s.product, s.tokens, s.hidden).requires_grad_()
        weight = random.values(s.product, s.vocabulary, s.hidden, scale=s.hidden**-0.5).requires_grad_()
        loss = linear_cross_entropy(hidden, weight, random.words(s.tokens, s.vocabulary), upstream=1.0 / s.tokens)
        torch.autograd.grad(loss / s.tokens, [hidden, weight])
