"""Adam with decoupled weight decay, for all parameters of a group at once.

    g = factor * gradient                      m = beta1 m + (1 - beta1) g         v = beta2 v + (1 - beta2) g²
    w = w - lr decay w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

`factor` is what clipping and loss scaling come to, a number on the device; so is `skip`, which leaves weights, moments
and step counts t as they are. All arithmetic is fp32, each result rounded once. Where there is a master copy w of
low-precision weights, those are written too; of bf16 weights it may be kept as what they are short of it
(`split_fp32.py`). The kernel reads and writes every byte once.

Source: Loshchilov and Hutter, 2019, arXiv 1711.05101; order of operations as in torch's fused AdamW.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from neox_hf.kernels.dispatch import Op
from neox_hf.kernels.language import tl, triton
from neox_hf.kernels.launch_choice import LaunchChoice
from neox_hf.kernels.split_fp32 import halves, join_fp32, joined, split_fp32
from neox_hf.kernels.tensor_list import ELEMENT_TYPES, LARGEST_CHUNK, TensorTables, find_chunk, is_aligned

BLOCK = 1024
WARPS = 4

BYTES_THAT_FILL_A_PROGRAM = 24
"""Read and written for one element, from which on a program has one block and no loop: on an H200 the step with fp32
masters, 30 bytes, takes 10.1 ms for 1.4e9 parameters so, 10.8 with 64 blocks, and a copy of as many bytes 10.0."""


@dataclass(frozen=True)
class StepLaunch:
    """block: elements that a program steps at a time. warps: of it. chunk: elements of it in all, at most."""

    block: int
    warps: int
    chunk: int


def _step_launches(moved: int) -> tuple[StepLaunch, ...]:
    """moved: bytes read and written for one element."""
    blocks = ((BLOCK, WARPS), (512, 4), (2048, 4), (2048, 8), (BLOCK, 8))
    alone = [StepLaunch(block, warps, chunk=block) for block, warps in blocks]
    looping = [StepLaunch(block, warps, LARGEST_CHUNK) for block, warps in blocks]
    if moved >= BYTES_THAT_FILL_A_PROGRAM:
        return *alone, looping[0]
    return *looping, alone[0]


STEP = LaunchChoice("adamw", _step_launches)


@dataclass(frozen=True)
class AdamWTensors:
    """Lists of equal length, one entry for each parameter; all of an entry but the step have the parameter's shape.

    weights: what the model computes with. gradients: of any dtype. masters: fp32 copies of the weights; or int16, the
    remainders that bf16 weights are short of them; or None where the weights are their own. exp_avgs, exp_avg_sqs: the
    moments m and v. steps: t, fp32 scalars on the same device.
    """

    weights: list[Tensor]
    gradients: list[Tensor]
    masters: list[Tensor] | None
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]

    @property
    def columns(self) -> list[list[Tensor]]:
        """In the order in which the kernel's table has them."""
        masters = [] if self.masters is None else [self.masters]
        return [self.weights, self.gradients, self.exp_avgs, self.exp_avg_sqs, self.steps, *masters]

    @property
    def has_remainders(self) -> bool:
        """Whether `masters` are what weights are short of them."""
        return bool(self.masters) and self.masters[0].dtype == torch.int16

    def one_by_one(self) -> Iterator["AdamWTensors"]:
        """Each entry by itself."""
        for entry in range(len(self.weights)):
            yield self._picked([entry])

    def _picked(self, entries: list[int]) -> "AdamWTensors":
        return AdamWTensors(
            *[None if column is None else [column[e] for e in entries] for column in vars(self).values()]
        )

    def alike(self) -> Iterator["AdamWTensors"]:
        """Parts in which all entries have the same dtypes, and weights on the same device."""
        # One part is the rule, and quicker found out than the parts are made.
        if len({w.device for w in self.weights}) == 1 == max(len({x.dtype for x in column}) for column in self.columns):
            yield self
            return
        parts: dict[tuple, list[int]] = {}
        for entry, row in enumerate(zip(*self.columns, strict=True)):
            parts.setdefault((row[0].device, *[tensor.dtype for tensor in row]), []).append(entry)
        for entries in parts.values():
            yield self._picked(entries)


@dataclass(frozen=True)
class AdamWRates:
    """Numbers that may change every step. A tensor for `lr` is read on the device, as a CUDA graph needs it."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def adamw_reference(
    tensors: AdamWTensors,
    rates: AdamWRates,
    factor: Tensor | None,
    skip: Tensor | None,
    zero_gradients: bool,
    tables: TensorTables,
) -> None:
    """torch's own fused AdamW, on copies of what has less precision than fp32 or lies in memory otherwise than its
    weight: torch reads all four of a parameter in the order of their memory, or refuses to. One parameter after another
    where masters have to be put together, so that no two are there at a time."""
    if tensors.has_remainders and len(tensors.weights) > 1:
        for one in tensors.one_by_one():
            adamw_reference(one, rates, factor, skip, zero_gradients, tables)
        return
    masters = whole_masters(tensors)
    narrow = [tensors.weights if masters is None else masters, tensors.exp_avgs, tensors.exp_avg_sqs]
    weights = [_at_least_fp32(w) for w in narrow[0]]
    wide = [[_laid_out_as(w, _at_least_fp32(x)) for w, x in zip(weights, column, strict=True)] for column in narrow]
    gradients = [_laid_out_as(w, g.to(w.dtype)) for w, g in zip(weights, tensors.gradients, strict=True)]
    if factor is not None:
        gradients = [g * factor for g in gradients]
    adamw(
        wide[0],
        gradients,
        *wide[1:],
        [],
        tensors.steps,
        fused=True,
        found_inf=None if skip is None else (skip != 0).float(),
        amsgrad=False,
        beta1=rates.beta1,
        beta2=rates.beta2,
        lr=rates.lr,
        weight_decay=rates.weight_decay,
        eps=rates.eps,
        maximize=False,
    )
    for column, results in zip(narrow, wide, strict=True):
        for kept, result in zip(column, results, strict=True):
            if kept is not result:
                kept.copy_(result)
    if masters is not None:
        _round_to_weights(tensors, masters, skip)
    if zero_gradients:
        torch._foreach_zero_(tensors.gradients)


def whole_masters(tensors: AdamWTensors) -> list[Tensor] | None:
    """In fp32: those that are kept, or made of both halves."""
    if not tensors.has_remainders:
        return tensors.masters
    return [join_fp32(high, remainder) for high, remainder in zip(tensors.weights, tensors.masters, strict=True)]


def _round_to_weights(tensors: AdamWTensors, masters: list[Tensor], skip: Tensor | None) -> None:
    """Have the weights, and remainders where they are kept, be what `masters` are; no write where `skip` is set."""
    kept, results = tensors.weights, [m.to(w.dtype) for w, m in zip(tensors.weights, masters, strict=True)]
    if tensors.has_remainders:
        highs, remainders = zip(*map(split_fp32, masters), strict=True)
        kept, results = [*tensors.weights, *tensors.masters], [*highs, *remainders]
    if skip is not None:
        results = [torch.where(skip != 0, old, new) for old, new in zip(kept, results, strict=True)]
    torch._foreach_copy_(kept, results)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _laid_out_as(weight: Tensor, x: Tensor) -> Tensor:
    """x, or a copy of it with the strides of `weight`."""
    return x if x.stride() == weight.stride() else torch.empty_like(weight, dtype=x.dtype).copy_(x)


@triton.jit
def _is_set(flag):
    """1 where the step is to be skipped, else 0; never skipped, where no flag is given."""
    return tl.full([], 0, tl.int32) if flag is None else (tl.load(flag) != 0).to(tl.int32)


@triton.jit(do_not_specialize=["rows"])
def _begin_step_kernel(
    addresses, rows, scalars, skip, lr, weight_decay, log_beta1, log_beta2,
    COLUMNS: tl.constexpr, LR_ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the step of each row, and compute what its elements share: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
    and lr * decay. In fp64, since 1 - beta2^t has lost most of its digits in fp32 when t is small."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    step = tl.load(addresses + row * COLUMNS + 4, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    count = tl.load(step, mask=inside, other=0.0) + 1
    rate = tl.load(lr) if LR_ON_DEVICE else lr
    bias1 = 1 - tl.exp(count.to(tl.float64) * log_beta1)
    bias2 = 1 - tl.exp(count.to(tl.float64) * log_beta2)
    tl.store(scalars + row * 3, (rate / bias1).to(tl.float32), mask=inside)
    tl.store(scalars + row * 3 + 1, (1 / tl.sqrt(bias2)).to(tl.float32), mask=inside)
    tl.store(scalars + row * 3 + 2, tl.zeros([BLOCK], tl.float32) + rate * weight_decay, mask=inside)
    tl.store(step, count - _is_set(skip), mask=inside)


@triton.jit
def _update(
    weight, gradient, exp_avg, exp_avg_sq, master, mask,
    factor, rate, root, decay, beta1_rest, beta2, beta2_rest, eps,
    HAS_MASTER: tl.constexpr, SPLIT: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """One block of elements, whose pointers are given."""
    own = master if HAS_MASTER else weight
    if SPLIT:
        w = joined(tl.load(weight, mask=mask), tl.load(master, mask=mask))
    else:
        w = tl.load(own, mask=mask).to(tl.float32)
    g = tl.load(gradient, mask=mask).to(tl.float32) * factor
    m = tl.load(exp_avg, mask=mask).to(tl.float32)
    v = tl.load(exp_avg_sq, mask=mask).to(tl.float32)
    m += (g - m) * beta1_rest
    v = v * beta2 + g * g * beta2_rest
    w -= w * decay
    w -= tl.div_rn(rate * m, tl.sqrt_rn(v) * root + eps)
    if SPLIT:
        high, remainder = halves(w)
        tl.store(weight, high, mask=mask)
        tl.store(master, remainder, mask=mask)
    else:
        tl.store(own, w.to(own.dtype.element_ty), mask=mask)
        if HAS_MASTER:
            tl.store(weight, w.to(weight.dtype.element_ty), mask=mask)
    tl.store(exp_avg, m.to(exp_avg.dtype.element_ty), mask=mask)
    tl.store(exp_avg_sq, v.to(exp_avg_sq.dtype.element_ty), mask=mask)
    if ZERO:
        tl.store(gradient, tl.zeros(gradient.shape, gradient.dtype.element_ty), mask=mask)


@triton.jit
def _adamw_kernel(
    addresses, owners, first_chunks, numels, scalars, factor, skip, beta1_rest, beta2, beta2_rest, eps,
    WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
    MASTER: tl.constexpr, HAS_MASTER: tl.constexpr, SPLIT: tl.constexpr, ZERO: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row, start, length = find_chunk(owners, first_chunks, numels, CHUNK)
    addresses += row * COLUMNS
    at_weight, at_gradient = tl.load(addresses), tl.load(addresses + 1)
    at_exp_avg, at_exp_avg_sq = tl.load(addresses + 2), tl.load(addresses + 3)
    at_master = tl.load(addresses + 5) if HAS_MASTER else at_weight
    weight = at_weight.to(tl.pointer_type(WEIGHT)) + start
    gradient = at_gradient.to(tl.pointer_type(GRADIENT)) + start
    exp_avg = at_exp_avg.to(tl.pointer_type(EXP_AVG)) + start
    exp_avg_sq = at_exp_avg_sq.to(tl.pointer_type(EXP_AVG_SQ)) + start
    master = at_master.to(tl.pointer_type(MASTER)) + start
    rate, root, decay = tl.load(scalars + row * 3), tl.load(scalars + row * 3 + 1), tl.load(scalars + row * 3 + 2)
    scale = 1.0 if factor is None else tl.load(factor)

    live = length * (1 - _is_set(skip))
    aligned = is_aligned(at_weight | at_gradient | at_exp_avg | at_exp_avg_sq | at_master)
    whole = tl.where(aligned, live // BLOCK, 0) * BLOCK
    columns = tl.arange(0, BLOCK)
    for at in range(0, whole, BLOCK):
        _update(
            tl.multiple_of(weight, VECTOR * WEIGHT.primitive_bitwidth // 8) + (at + columns),
            tl.multiple_of(gradient, VECTOR * GRADIENT.primitive_bitwidth // 8) + (at + columns),
            tl.multiple_of(exp_avg, VECTOR * EXP_AVG.primitive_bitwidth // 8) + (at + columns),
            tl.multiple_of(exp_avg_sq, VECTOR * EXP_AVG_SQ.primitive_bitwidth // 8) + (at + columns),
            tl.multiple_of(master, VECTOR * MASTER.primitive_bitwidth // 8) + (at + columns),
            None, scale, rate, root, decay, beta1_rest, beta2, beta2_rest, eps, HAS_MASTER, SPLIT, ZERO,
        )  # fmt: skip
    for at in range(whole, live, BLOCK):
        _update(
            weight + at + columns, gradient + at + columns, exp_avg + at + columns, exp_avg_sq + at + columns,
            master + at + columns, at + columns < live,
            scale, rate, root, decay, beta1_rest, beta2, beta2_rest, eps, HAS_MASTER, SPLIT, ZERO,
        )  # fmt: skip
    if ZERO:
        for at in range(live, length, BLOCK):
            tl.store(gradient + at + columns, tl.zeros([BLOCK], GRADIENT), mask=at + columns < length)


def adamw_triton(
    tensors: AdamWTensors,
    rates: AdamWRates,
    factor: Tensor | None,
    skip: Tensor | None,
    zero_gradients: bool,
    tables: TensorTables,
) -> None:
    if tensors.steps[0].dtype != torch.float32:
        raise ValueError(f"adamw_ was given steps of {tensors.steps[0].dtype}; its kernel counts in fp32")
    copies = [(g if g.dtype in ELEMENT_TYPES else g.float()).contiguous() for g in tensors.gradients]
    columns = tensors.columns
    columns[1] = copies
    split = tensors.has_remainders
    launch = STEP.chosen(columns[0][0].device, columns[0][0].dtype, _bytes_moved(columns, split))
    table = tables.table(columns, launch.chunk)
    skip = skip.view(torch.uint8) if skip is not None and skip.dtype == torch.bool else skip
    scalars = _begin_step(table.addresses, rates, skip)
    layout = table.layout
    if layout.chunks:
        types = [ELEMENT_TYPES[column[0].dtype] for column in columns]
        if split:
            types[0] = types[-1]  # halves of one number, of which neither is one
        _adamw_kernel[(layout.chunks,)](
            table.addresses, layout.owners, layout.first_chunks, layout.numels, scalars, factor, skip,
            1 - rates.beta1, float(rates.beta2), 1 - rates.beta2, float(rates.eps), *types[:4],
            MASTER=types[0] if tensors.masters is None else types[-1], HAS_MASTER=tensors.masters is not None,
            SPLIT=split, ZERO=zero_gradients, COLUMNS=len(columns), CHUNK=layout.chunk,
            VECTOR=16 // max(column[0].itemsize for column in columns if column is not tensors.steps),
            BLOCK=launch.block, num_warps=launch.warps,
        )  # fmt: skip
    if zero_gradients:
        for gradient, copy in zip(tensors.gradients, copies, strict=True):
            if copy is not gradient:
                gradient.zero_()


def _bytes_moved(columns: list[list[Tensor]], split: bool) -> int:
    """Read and written for one element."""
    weights, gradients, *states = [column[0].itemsize for place, column in enumerate(columns) if place != 4]  # no steps
    only_written = len(states) > 2 and not split
    return (1 if only_written else 2) * weights + gradients + 2 * sum(states)


def _begin_step(addresses: Tensor, rates: AdamWRates, skip: Tensor | None) -> Tensor:
    """Launch the small kernel before the large one; returns its [rows, 3] fp32."""
    rows, columns = addresses.shape
    scalars = torch.empty(rows, 3, dtype=torch.float32, device=addresses.device)
    on_device = isinstance(rates.lr, Tensor) and rates.lr.device == addresses.device
    _begin_step_kernel[((rows + 127) // 128,)](
        addresses, rows, scalars, skip, rates.lr.float() if on_device else float(rates.lr),
        float(rates.weight_decay), *(math.log(beta) if beta > 0 else -math.inf for beta in (rates.beta1, rates.beta2)),
        COLUMNS=columns, LR_ON_DEVICE=on_device, BLOCK=128,
    )  # fmt: skip
    return scalars


ADAMW = Op("adamw", torch=adamw_reference, triton=adamw_triton)


@torch.no_grad()
def adamw_(
    tensors: AdamWTensors,
    rates: AdamWRates,
    *,
    factor: Tensor | None = None,
    skip: Tensor | None = None,
    zero_gradients: bool = False,
    tables: TensorTables | None = None,
    backend: str = "auto",
) -> None:
    """Take one step, in place. It never waits for the device.

    Plain launches rather than operators of `torch.library`: no gradient flows through a step, and naming its thousand
    tensors to the dispatcher would cost the host more than the launch.

    Args:
        factor: what gradients are multiplied by, an fp32 scalar on the device; None is 1.
        skip: a scalar on the device; where it is not 0, nothing but gradients to be zeroed is written.
        zero_gradients: leave zeros in the gradients, in the same pass.
        tables: the caller's, if it comes back with the same tensors.

    Raises:
        ValueError: a weight or its state has gaps, lies elsewhere, is not as long as the other or of a dtype that is
            not read, and the kernel was chosen.
    """
    tables = TensorTables() if tables is None else tables
    for part in tensors.alike():
        ADAMW.choose(backend, part.weights[0])(part, rates, factor, skip, zero_gradients, tables)
