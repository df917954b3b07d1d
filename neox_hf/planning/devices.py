"""Devices as far as a plan needs to know them: what they sustain, not what their data sheets promise."""

from collections.abc import Mapping
from dataclasses import dataclass

from neox_hf.config import nearest
from neox_hf.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device and its way to others.

    gib: memory that a process can have. matmul_tflops: sustained rate of matrix products by bytes of an element:
    4 is fp32, 2 is bf16 and fp16, 1 is fp8. attention_tflops: causal attention, forward and backward together, by head
    size, counting only the products under the diagonal. bandwidth_gbps: a copy's reads and writes.
    link_gbps: between devices of one host, NCCL's bus bandwidth; network_gbps: to another host, for each device.
    host_gbps: to the host's memory. host_memory_gbps: what the host's processors read and write, for each device.
    latency: seconds of a message without content. devices: in one host.
    """

    name: str
    gib: float
    matmul_tflops: Mapping[int, float]
    attention_tflops: Mapping[int, float]
    bandwidth_gbps: float
    link_gbps: float
    network_gbps: float
    host_gbps: float
    host_memory_gbps: float
    latency: float
    devices: int

    def attention_at(self, head_size: int) -> float:
        """TFLOP/s at a head size: that of the largest known one below it. Smaller heads fill the units in part."""
        known = [size for size in self.attention_tflops if size <= head_size]
        if known:
            return self.attention_tflops[max(known)]
        smallest = min(self.attention_tflops)
        return self.attention_tflops[smallest] * head_size / smallest

    def between(self, ranks: int) -> float:
        """GB/s of a message among `ranks` neighbouring ranks: the host's links, if all of them fit into a host."""
        return self.link_gbps if ranks <= self.devices else self.network_gbps


# Measured on H200s of 2026-11-22, 700 W, torch 2.11: bf16 at 8192^3 over 3 s 668 to 684 TFLOP/s (a burst of ten gives
# 775), fp8 at the shapes of a block 1217 to 1332, a copy of 4 GiB 4285 GB/s, cuDNN's attention at 2048 tokens 408 to
# 437 (head size 128) and 294 to 339 (64); two cards by NVLink 330 GB/s. fp32 without TF32 is nine tenths of NVIDIA's
# data sheet (67). Latency is what NCCL usually takes for a small message in one host. Not measured: the network, which
# is the 400 Gbit/s adapter that a DGX H200 has for each card, PCIe 5 x16 and the host's memory, shared by eight.
H200 = Device(
    name="H200",
    gib=139.8,
    matmul_tflops={4: 60.0, 2: 675.0, 1: 1250.0},
    attention_tflops={64: 310.0, 128: 430.0},
    bandwidth_gbps=4285.0,
    link_gbps=330.0,
    network_gbps=45.0,
    host_gbps=50.0,
    host_memory_gbps=50.0,
    latency=20e-6,
    devices=8,
)

# The same processor at the same power beside slower and less memory: 3350 GB/s on the data sheet for the H200's 4800.
H100 = Device(
    name="H100",
    gib=79.1,
    matmul_tflops=H200.matmul_tflops,
    attention_tflops=H200.attention_tflops,
    bandwidth_gbps=2990.0,
    link_gbps=H200.link_gbps,
    network_gbps=H200.network_gbps,
    host_gbps=H200.host_gbps,
    host_memory_gbps=H200.host_memory_gbps,
    latency=H200.latency,
    devices=8,
)

DEVICES = {device.name: device for device in (H200, H100)}


def device_called(name: str) -> Device:
    """The device whose name is `name` or a part of it, such as "NVIDIA H200".

    Raises:
        RecipeError: it is none of those known.
    """
    found = [device for known, device in DEVICES.items() if known.lower() in name.lower()]
    if found:
        return found[0]
    close = nearest(name, DEVICES)
    hint = f"Did you mean {close!r}? " if close else ""
    raise RecipeError(f"device {name!r} is unknown. {hint}Choose one of {', '.join(DEVICES)}, or describe a Device")
