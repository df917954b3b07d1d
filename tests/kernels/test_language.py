"""Where kernels can be launched, and what stands in for Triton where it does not exist."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neox_hf.kernels import language

ROOT = Path(__file__).parents[2]
WITHOUT_TRITON = """
import sys
from importlib import abc, machinery, util

found = util.find_spec
util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
import torch
from neox_hf.kernels import layer_norm
from neox_hf.kernels.language import runs_on, tl, triton

@triton.jit
def kernel(x, SIZE: tl.constexpr):
    pass

assert not runs_on(torch.device("cuda")) and not runs_on(torch.device("cpu"))
x = torch.randn(3, 8)
assert layer_norm(x, torch.ones(8), None, 1e-5).shape == x.shape
"""


@pytest.mark.parametrize(
    ("interpret", "device", "expected"),
    [("0", "cpu", False), ("0", "cuda", True), ("0", "meta", True), ("1", "cpu", True), ("1", "mps", False)],
)
def test_runs_on(interpret, device, expected, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert language.runs_on(torch.device(device)) is expected


def test_the_references_work_where_there_is_no_triton():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, check=True)
