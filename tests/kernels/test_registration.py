"""Functions as ops: what compilers, autograd and dispatch modes learn about them."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neox_hf.kernels.devices import is_elsewhere, multiprocessors, on_device_of
from neox_hf.kernels.once_differentiable import once_differentiable
from neox_hf.kernels.registration import register, register_fake


@register("trial_scale_into", mutates=("into", "count"))
def scale_into(x: Tensor, into: Tensor, count: Tensor | None, factor: float) -> None:
    # As a kernel writes: no version counter of these rises.
    torch.mul(x, factor, out=into.data)
    if count is not None:
        count.data.add_(1)


@register_fake(scale_into)
def _(x: Tensor, into: Tensor, count: Tensor | None, factor: float) -> None:
    return None


@register("trial_halves")
def halves(x: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
    return [half.to(dtype, copy=True) for half in x.detach().chunk(2)]


@register_fake(halves)
def _(x: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
    return [torch.empty_like(half, dtype=dtype) for half in x.chunk(2)]


def test_opcheck():
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    x = torch.randn(4, 3)
    torch.library.opcheck(halves, (x, torch.float64), test_utils=checks)
    torch.library.opcheck(scale_into, (x, torch.empty(4, 3), torch.zeros(1), 2.0), test_utils=checks)
    torch.library.opcheck(scale_into, (x, torch.empty(4, 3), None, 2.0), test_utils=checks)


def test_schema_names_what_changes():
    assert str(scale_into._schema) == (
        "neox_hf::trial_scale_into(Tensor x, Tensor(a1!) into, Tensor(a2!)? count, float factor) -> ()"
    )


def test_versions_of_changed_arguments_alone_rise():
    x, into, count = torch.ones(2), torch.empty(2), torch.zeros(1)
    scale_into(x, into, None, 2.0)
    scale_into(x, into.detach(), count, 2.0)  # what is detached shares the counter
    assert (x._version, into._version, count._version) == (0, 2, 1)


def test_who_kept_what_has_changed_is_told():
    kept = torch.ones(2, requires_grad=True).exp()
    with torch.no_grad():
        scale_into(torch.ones(2), kept.detach(), None, 2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_a_dispatch_mode_sees_the_op_and_nothing_within():
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x, into = torch.ones(2), torch.empty(2)
    with Record():
        scale_into(x, into, None, 3.0)
    assert seen == [scale_into]
    assert into.tolist() == [3.0, 3.0]


def test_shapes_alone():
    first, second = halves(torch.empty(4, 3, device="meta"), torch.bfloat16)
    assert first.is_meta
    assert (first.shape, first.dtype) == (second.shape, second.dtype) == ((2, 3), torch.bfloat16)


def test_a_compiler_knows_what_changes():
    def function(x):
        into = x + 1
        before = into * 1
        scale_into(x, into, None, 5.0)
        return before, into

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = torch.randn(3)
    for ours, wanted in zip(compiled(x), (x + 1, x * 5), strict=True):
        assert torch.equal(ours, wanted)


def test_a_second_derivative_is_refused():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @once_differentiable
        def backward(ctx, dy):
            assert not torch.is_grad_enabled()
            return 2 * dy

    x = torch.ones(2, requires_grad=True)
    assert torch.autograd.grad(Double.apply(x).sum(), x)[0].tolist() == [2, 2]
    y = x * x
    (gradient,) = torch.autograd.grad(Double.apply(y).pow(2).sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(("of_tensor", "current", "elsewhere"), [(0, 0, False), (1, 0, True)])
def test_a_tensor_of_another_gpu_is_noticed(of_tensor, current, elsewhere, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    assert is_elsewhere(SimpleNamespace(is_cuda=True, get_device=lambda: of_tensor)) is elsewhere


def test_on_the_cpu_no_device_is_changed():
    assert not is_elsewhere(torch.ones(1))
    with on_device_of(torch.ones(1)):
        assert multiprocessors(torch.device("cpu")) == 1


def test_a_gpu_is_asked_for_its_size_once(monkeypatch):
    asked = []
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or properties)
    device = torch.device("cuda", 63)
    assert [multiprocessors(device), multiprocessors(device)] == [132, 132]
    assert asked == [device]
