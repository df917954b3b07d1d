"""What operations with a backward pass of their own ask autocast."""

import torch

from neox_hf.kernels.autocast import autocast_dtype, without_autocast

CPU, META = torch.device("cpu"), torch.device("meta")


def test_dtype_of_products():
    assert autocast_dtype(CPU) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert autocast_dtype(CPU) == torch.bfloat16
        assert autocast_dtype(META) is None


def test_a_compiler_reads_it():
    @torch.compile(fullgraph=True, backend="eager")
    def in_product_dtype(x):
        return x.to(autocast_dtype(x.device) or x.dtype)

    assert in_product_dtype(torch.ones(2)).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert in_product_dtype(torch.ones(2)).dtype == torch.bfloat16


def test_a_compiler_is_asked_nothing_that_old_ones_cannot_trace(monkeypatch):
    def untraceable(device_type):
        raise AssertionError(f"torch 2.11 cannot trace a question about {device_type}")

    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    assert autocast_dtype(CPU) is None


def test_suspension():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with without_autocast(CPU):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with without_autocast(META):
        assert (torch.ones(2, 2, device="meta") @ torch.ones(2, 2, device="meta")).is_meta
