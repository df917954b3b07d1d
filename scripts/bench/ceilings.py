"""What this device does today with nothing but a copy, or nothing but matrix products."""

import time

import torch
from torch.nn import functional as F

from scripts.bench.timing import op_ms

COPIED_BYTES = 2**32
PRODUCT_SIZE = 8192
BURST_PRODUCTS = 10


def copy_bandwidth(device: torch.device, size: int = COPIED_BYTES) -> float:
    """GB/s, read and written, of a kernel that copies `size` bytes."""
    source = torch.ones(size // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    # Not `copy_`: in a graph that becomes a node of another kind, which is slower.
    timing = op_ms(lambda: torch.mul(source, 1.5, out=target), captured=False)
    return 2 * size / timing.ms / 1e6


def product_rates(device: torch.device, seconds: float = 3.0, size: int = PRODUCT_SIZE) -> tuple[float, float]:
    """TFLOP/s of bf16 products: of the first few, and of those at the end of `seconds` of them."""
    x, weight = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(x)

    def rate(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            torch.mm(x, weight, out=out)
        synchronise(device)
        return count * 2 * size**3 / (time.perf_counter() - begin) / 1e12

    F.linear(x, weight)
    synchronise(device)
    burst = rate(BURST_PRODUCTS)
    end, sustained = time.perf_counter() + seconds, burst
    while time.perf_counter() < end:
        sustained = rate(20 * BURST_PRODUCTS if device.type == "cuda" else 1)
    return burst, sustained


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_ceilings(device: torch.device) -> dict[str, float]:
    copied = copy_bandwidth(device)
    burst, sustained = product_rates(device)
    return {"copy_gb_s": copied, "burst_tflops": burst, "sustained_tflops": sustained}
