"""Other forms of the ops that a step has: the tanh GELU, dropout, z-loss, a share of the words, eight bits."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neox_hf import kernels
from neox_hf.kernels.bias_dropout_residual import draw_dropout_seed
from neox_hf.kernels.fp8_linear import Fp8Linear, fp8_linear, slot_dtypes
from neox_hf.kernels.fp8_mlp import fp8_mlp
from neox_hf.kernels.fp8_scales import Fp8Scales
from scripts.bench.case import Case, streams, wides
from scripts.bench.floors import FP8_PRODUCTS, Shapes
from scripts.bench.inputs import Inputs, Random
from scripts.bench.ops import activation_inputs, head_inputs, head_products, mlp_inputs, own_head, products, stock_head
from scripts.bench.other_ops import own_branches, rows

DROPPED = 0.1
Z_LOSS = 1e-4


def torch_dropout(x: Tensor, first: Tensor, second: Tensor, bias1: Tensor, bias2: Tensor) -> Tensor:
    return x + F.dropout(first + bias1, DROPPED) + F.dropout(second + bias2, DROPPED)


def own_dropout(x: Tensor, *branches: Tensor, backend: str) -> Tensor:
    return own_branches(x, *branches, backend=backend, probability=DROPPED, seed=draw_dropout_seed(x.device))


def torch_z_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels) + Z_LOSS * logits.logsumexp(-1).square().mean()


def as_it_is(_: Tensor) -> None:
    """A reduction over one rank."""


def fp8_states(random: Random, *names: str) -> tuple[Fp8Scales, tuple[Fp8Linear, ...]]:
    table = Fp8Scales(slot_dtypes(names), random.device)
    return table, tuple(Fp8Linear(table, name) for name in names)


def settled(inputs: Inputs, table: Fp8Scales, op: Any) -> Inputs:
    """After a step, so that scales are known; the weight's cast is the optimizer's and no part of what is timed."""
    inputs.forward_and_backward(op)
    table.advance()
    return inputs


def fp8_linear_inputs(s: Shapes, random: Random) -> Inputs:
    table, (state,) = fp8_states(random, "linear")
    whole = mlp_inputs(s, random)
    return settled(Inputs((*whole.arguments, state), whole.gradients), table, fp8_linear)


def fp8_mlp_inputs(s: Shapes, random: Random) -> Inputs:
    table, states = fp8_states(random, "up", "down")
    up = random.leaf(s.inner, s.hidden, scale=0.02), random.leaf(s.inner)
    down = random.leaf(s.hidden, s.inner, scale=0.02), random.leaf(s.hidden)
    arguments = (random.leaf(s.tokens, s.hidden), *up, *down, "erf", states)
    inputs = Inputs(arguments, (random.values(s.tokens, s.hidden),))
    return settled(inputs, table, fp8_mlp)


def torch_mlp(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, *_: Any) -> Tensor:
    return F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias)


FORMS = (
    Case(
        "bias + GELU, tanh",
        make=activation_inputs,
        torch=lambda x, bias: F.gelu(x + bias, approximate="tanh"),
        ours=lambda x, bias, backend: kernels.bias_gelu(x, bias, "tanh", backend=backend),
        forward=wides(2),
        both=wides(5),
    ),
    Case(
        "residual + two branches with biases, dropped",
        make=lambda s, r: rows(s, r, 3, s.hidden, s.hidden),
        torch=torch_dropout,
        ours=own_dropout,
        forward=streams(4),
        both=streams(7),
        checked=False,
    ),
    Case(
        "linear + cross-entropy, z-loss",
        make=head_inputs,
        torch=torch_z_loss,
        ours=partial(own_head, z_loss=Z_LOSS),
        forward=head_products(1),
        both=head_products(3),
    ),
    Case(
        "linear + cross-entropy, a share of the words",
        make=head_inputs,
        torch=stock_head,
        # As on a rank of a tensor group, whose messages take no time and change nothing.
        ours=partial(own_head, all_max=as_it_is, all_sum=as_it_is),
        forward=head_products(1),
        both=head_products(3),
        timed=("ours",),
    ),
    Case(
        "linear + bias, ours in eight bits",
        make=fp8_linear_inputs,
        torch=lambda x, weight, bias, _: F.linear(x, weight, bias),
        ours=lambda *given, backend: fp8_linear(*given),
        forward=products(1, FP8_PRODUCTS),
        both=products(3, FP8_PRODUCTS),
        checked=False,
    ),
    Case(
        "feed-forward half of a block, ours in eight bits",
        make=fp8_mlp_inputs,
        torch=torch_mlp,
        ours=lambda *given, backend: fp8_mlp(*given),
        forward=products(2, FP8_PRODUCTS),
        both=products(6, FP8_PRODUCTS),
        checked=False,
    ),
)
