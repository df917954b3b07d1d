"""fp32 numbers in two halves: together they are the number, and the upper one is what it rounds to."""

import pytest
import torch

from neox_hf.kernels.language import tl, triton
from neox_hf.kernels.split_fp32 import halves, join_fp32, joined, split_fp32

DEVICES = [*([] if torch.cuda.is_available() else ["cpu"]), pytest.param("cuda", marks=pytest.mark.gpu)]


@triton.jit
def halves_kernel(x, high, remainder, again, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    upper, lower = halves(tl.load(x + at))
    tl.store(high + at, upper)
    tl.store(remainder + at, lower)
    tl.store(again + at, joined(upper, lower))


@triton.jit
def joined_kernel(high, remainder, x, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(x + at, joined(tl.load(high + at), tl.load(remainder + at)))


def by_torch(x):
    high, remainder = split_fp32(x)
    return high, remainder, join_fp32(high, remainder)


def by_triton(x):
    high, remainder, again = (torch.empty_like(x, dtype=d) for d in (torch.int16, torch.int16, torch.float32))
    halves_kernel[(1,)](x, high, remainder, again, COUNT=x.numel())
    return high.view(torch.bfloat16), remainder, again


BOTH = pytest.mark.parametrize("split", [by_torch, by_triton])


def numbers_of(bits, device):
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).to(device).view(torch.float32)


@BOTH
@pytest.mark.parametrize("device", DEVICES)
def test_the_halves_are_the_number(split, device):
    """Of every sign and exponent, and numbers beside those half way between two of bf16."""
    random = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**16,), generator=random)
    bits[: 2**14] = (bits[: 2**14] & ~0xFFFF) + 0x8000 + torch.randint(1, 3, (2**14,), generator=random)
    x = numbers_of(bits.tolist(), device)
    x = torch.where(x.isnan(), 0.0, x)
    high, remainder, again = split(x)
    assert (high.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(high, x.bfloat16())
    assert torch.equal(again.view(torch.int32), x.view(torch.int32))


@BOTH
@pytest.mark.parametrize("device", DEVICES)
def test_half_way(split, device):
    """Rounding down to even: the nearest number that rounds so, too. Up to even: the number itself."""
    down, up = 0x3F808000, 0x3F818000
    x = numbers_of([down, down + 2**31, up, up + 2**31], device)
    high, _, again = split(x)
    assert torch.equal(high, x.bfloat16())
    assert torch.equal(again, numbers_of([down - 1, down - 1 + 2**31, up, up + 2**31], device))
    assert torch.equal(again.bfloat16(), high)


@pytest.mark.parametrize("device", DEVICES)
def test_a_zero_beside_what_another_number_lacked(device):
    """Somebody has set a weight to 0: nothing is below it, and above it less than any weight."""
    highs = torch.tensor([0.0, -0.0, 0.0, -0.0], device=device).bfloat16()
    remainders = torch.tensor([-5, -32768, 5, 32767], dtype=torch.int16, device=device)
    expected = numbers_of([0, 2**31, 5, 2**31 + 32767], device)
    assert torch.equal(join_fp32(highs, remainders), expected)
    again = torch.empty_like(expected)
    joined_kernel[(1,)](highs.view(torch.int16), remainders, again, COUNT=4)
    assert torch.equal(again, expected)


@BOTH
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_no_number(split, device):
    infinities = [0x7F800000, 0xFF800000]
    nans = [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001]
    largest, zeros = [0x7F7FFFFF, 0xFF7FFFFF], [0, 1 << 31]
    high, _, again = split(numbers_of([*infinities, *nans, *largest, *zeros, 1, 0x807FFFFF, 3, 7], device))
    assert again[:2].tolist() == high[:2].tolist() == [float("inf"), float("-inf")]
    assert again[2:8].isnan().all()
    assert high[2:8].isnan().all()
    assert again[8:].view(torch.int32).tolist()[:4] == [0x7F7FFFFF, 0xFF7FFFFF - 2**32, 0, -(2**31)]
    assert high[8:10].isinf().all()  # the largest numbers round to infinity, and are remembered
