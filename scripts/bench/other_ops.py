"""Ops that Pythia's step does not have, or has no target for: accurate and quick all the same."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neox_hf import kernels
from scripts.bench.case import Case, streams
from scripts.bench.floors import Shapes, Work
from scripts.bench.inputs import Inputs, Random

EPS = 1e-5


def rows(s: Shapes, random: Random, count: int, *widths: int) -> Inputs:
    """So many tensors [tokens, hidden], then parameters of these widths."""
    arguments = [random.leaf(s.tokens, s.hidden) for _ in range(count)] + [random.leaf(width) for width in widths]
    return Inputs(tuple(arguments), (random.values(s.tokens, s.hidden),))


def torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return kernels.RMS_NORM.torch(x, weight, EPS, None)


def torch_scale_norm(x: Tensor, g: Tensor) -> Tensor:
    return kernels.SCALE_NORM.torch(x, g, EPS)


def torch_branches(x: Tensor, first: Tensor, second: Tensor, bias1: Tensor, bias2: Tensor) -> Tensor:
    return x + (first + bias1) + (second + bias2)


def own_branches(
    x: Tensor, first: Tensor, second: Tensor, bias1: Tensor, bias2: Tensor, backend: str, **form: Any
) -> Tensor:
    return kernels.bias_dropout_residual(x, first, bias1, second, bias2, backend=backend, **form)


def score_inputs(s: Shapes, random: Random) -> Inputs:
    shape = (s.batch, s.heads, s.sequence, s.sequence)
    return Inputs((random.leaf(*shape),), (random.values(*shape),))


def score_work(s: Shapes, reads_and_writes: int) -> Work:
    return Work(moved=reads_and_writes * 2 * s.batch * s.heads * s.sequence**2)


def torch_softmax(scores: Tensor) -> Tensor:
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return torch.softmax(0.125 * scores.masked_fill(later, -torch.inf), dim=-1)


def word_inputs(s: Shapes, random: Random) -> Inputs:
    ids, weight = random.words(s.tokens, s.vocabulary), random.leaf(s.vocabulary, s.hidden)
    return Inputs((ids, weight), (random.values(s.tokens, s.hidden),))


OTHERS = (
    Case(
        "embedding",
        make=word_inputs,
        torch=F.embedding,
        ours=lambda ids, weight, backend: kernels.embedding(ids, weight, backend=backend),
        forward=streams(2),
        both=lambda s: Work(moved=3 * s.stream + 2 * s.vocabulary * s.hidden),
        timed=("ours", "torch"),
    ),
    Case(
        "residual + two branches",
        make=lambda s, r: rows(s, r, 3),
        torch=lambda x, first, second: x + first + second,
        ours=lambda *a, backend: kernels.residual_add(*a, backend=backend),
        forward=streams(4),
        both=streams(4),  # the three gradients are the one that came
    ),
    Case(
        "residual + two branches with biases",
        make=lambda s, r: rows(s, r, 3, s.hidden, s.hidden),
        torch=torch_branches,
        ours=own_branches,
        forward=streams(4),
        both=streams(5),
    ),
    Case(
        "RMS norm",
        make=lambda s, r: rows(s, r, 1, s.hidden),
        torch=torch_rms_norm,
        ours=lambda x, weight, backend: kernels.rms_norm(x, weight, EPS, backend=backend),
        forward=streams(2),
        both=streams(5),
    ),
    Case(
        "scale norm",
        make=lambda s, r: rows(s, r, 1, 1),
        torch=torch_scale_norm,
        ours=lambda x, g, backend: kernels.scale_norm(x, g, EPS, backend=backend),
        forward=streams(2),
        both=streams(5),
    ),
    Case(
        "causal softmax of scores",
        make=score_inputs,
        torch=torch_softmax,
        ours=lambda scores, backend: kernels.causal_softmax(scores, 0.125, backend=backend),
        # Scores of later keys are not read; zeros are written for them.
        forward=lambda s: score_work(s, 1.5),
        both=lambda s: score_work(s, 3.5),
    ),
)
