"""Products of matrices, written where they are wanted.

    out [M, N] = a [M, K] b [K, N] + bias [N]        or        out += a b

Summed in fp32; `out` has the operands' dtype or a wider one, and is rounded to it once. On CUDA, large products in half
precision are computed by whichever algorithm of cuBLASLt was quickest there (`product_choice.py`), all others by torch.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from neox_hf.kernels.autocast import autocast_dtype
from neox_hf.kernels.cublaslt import Matrix, Problem
from neox_hf.kernels.product_choice import Operands, Plan, choices_on
from neox_hf.kernels.registration import register, register_fake

HALF_PRECISION = (torch.bfloat16, torch.float16)

WORTH_CHOOSING = 2**32
"""Multiplications of a product that it pays to choose for: some 15 us of an H200."""

LEAST_ALIGNMENT, MOST_ALIGNMENT = 16, 256
"""Bytes that operands and their rows begin at a multiple of: the least that fast algorithms take, and what they ask."""


def product_(
    out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, *, keep: bool = False, backend: str = "auto"
) -> Tensor:
    """out = a b + bias, or, if `keep`, out + a b. backend: `torch` computes all products by torch."""
    if is_chosen(backend, a, b):
        product(out, a, b, bias, keep)
        return out
    return torch_product_(out, a, b, bias, keep=keep)


def linear_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """x weight^T + bias, as `F.linear`: x [..., in], weight [out, in] -> [..., out]. No gradient flows through it."""
    return linear_product_op(x, weight, bias) if is_chosen(backend, x, weight.t()) else F.linear(x, weight, bias)


def torch_product_(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, *, keep: bool = False) -> Tensor:
    """`product_`, by torch."""
    if bias is not None:
        return torch.addmm(bias, a, b, out=out)
    if out.dtype == a.dtype:
        return out.addmm_(a, b) if keep else torch.mm(a, b, out=out)
    if not out.is_cuda:
        return torch_product_(out, a.to(out.dtype), b.to(out.dtype), keep=keep)
    if keep:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def is_chosen(backend: str, a: Tensor, b: Tensor) -> bool:
    """Whether an algorithm is looked for. A compiler may fuse what it sees; a choice by time is not deterministic."""
    return (
        backend != "torch"
        and a.is_cuda
        and a.dtype == b.dtype
        and a.dtype in HALF_PRECISION
        and a.numel() * b.shape[1] >= WORTH_CHOOSING
        and not torch.compiler.is_compiling()
        and not torch.are_deterministic_algorithms_enabled()
        and autocast_dtype(a.device) in (None, a.dtype)
    )


@register("product", mutates=("out",))
def product(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, keep: bool) -> None:
    """`product_`, by what was quickest."""
    plan = _plan(out, a, b, bias, keep)
    if plan is None:
        torch_product_(out, a, b, bias, keep=keep)
    else:
        plan.run(out, a, b, bias, keep)


@register_fake(product)
def _(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, keep: bool) -> None:
    return None


# An op of its own, whose result checkpointing can keep (modeling/recompute.py).
@register("linear_product")
def linear_product_op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear_product`, by what was quickest."""
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    product(out.flatten(0, -2), x.flatten(0, -2), weight.t(), bias, False)
    return out


@register_fake(linear_product_op)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _plan(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, keep: bool) -> Plan | None:
    problem, choices = problem_of(out, a, b, bias), choices_on(out.device)
    if problem is None or choices is None:
        return None

    def operands() -> Operands:
        # As `out` lies, gaps between its rows included: the problem has its strides.
        scratch = out.new_empty_strided(out.shape, out.stride()) if keep else out
        return Operands(scratch, a, b, bias, partial(torch_product_, scratch, a, b, bias))

    return choices.plans[problem] if problem in choices.plans else choices.make_plan(problem, operands)


def problem_of(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Problem | None:
    """What cuBLASLt is asked for; None where the operands lie as it does not take them, or not well."""
    first, second = _matrix(a), _matrix(b)
    result = _matrix(out)
    if first is None or second is None or result is None or result.transposed:
        return None
    if bias is not None and (bias.dtype != out.dtype or bias.stride(0) != 1):
        return None
    alignment = MOST_ALIGNMENT
    for each in (out, a, b) if bias is None else (out, a, b, bias):
        alignment |= each.data_ptr()
    alignment &= -alignment
    strides = (result.stride * out.element_size(), first.stride * a.element_size(), second.stride * b.element_size())
    if alignment < LEAST_ALIGNMENT or any(stride % LEAST_ALIGNMENT for stride in strides):
        return None
    rows, inner = a.shape
    return Problem(
        rows, b.shape[1], inner, first, second, result.stride, a.dtype, out.dtype, bias is not None, alignment
    )


def _matrix(x: Tensor) -> Matrix | None:
    """How x lies, if either its rows or its columns are contiguous and do not overlap."""
    rows, columns = x.shape
    by_row, by_column = x.stride()
    if by_column == 1 and by_row >= columns:
        return Matrix(False, by_row)
    if by_row == 1 and by_column >= rows:
        return Matrix(True, by_column)
    return None
