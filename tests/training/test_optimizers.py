"""Our AdamW: torch's numbers, with and without fp32 master weights, clipping and skipping inside the step."""

import copy
import math

import pytest
import torch
from torch import nn

from neox_hf.errors import RecipeError
from neox_hf.parallel.data_parallel import accumulate_gradients_in_fp32
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.fused_adamw import FusedAdamW
from neox_hf.training.optimizers import MasterAdamW, optimizer_class

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OURS = {
    "fp32": (FusedAdamW, torch.float32),
    "pure_bf16": (FusedAdamW, torch.bfloat16),
    "masters": (MasterAdamW, torch.bfloat16),
}
HYPER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("fused", [True, False])
def test_masters_follow_torch_adamw_in_fp32(fused):
    low = torch.nn.Parameter(torch.randn(7, 5).bfloat16())
    full = torch.nn.Parameter(low.detach().float())
    ours, torchs = MasterAdamW([low], fused=fused, **HYPER), torch.optim.AdamW([full], **HYPER)
    for _ in range(5):
        gradient = torch.randn(7, 5)
        low.grad, full.grad = gradient.bfloat16(), gradient.bfloat16().float()
        ours.step()
        torchs.step()
    torch.testing.assert_close(ours.master_of(low), full.detach(), rtol=1e-6, atol=1e-7)
    assert torch.equal(low, ours.master_of(low).bfloat16())


def test_a_master_is_kept_as_what_the_weight_is_short_of():
    """16 bits for each element of a bf16 parameter; whole where the parameter is no half of it."""
    bf16, fp16 = (torch.nn.Parameter(torch.randn(9).to(dtype)) for dtype in (torch.bfloat16, torch.float16))
    optimizer = MasterAdamW([bf16, fp16], **HYPER)
    assert optimizer.master_of(bf16) is None
    draw_gradients([bf16, fp16], 0)
    optimizer.step()
    assert optimizer.state[bf16].keys() == {"remainder", "exp_avg", "exp_avg_sq", "step"}
    assert optimizer.state[bf16]["remainder"].dtype == torch.int16
    assert optimizer.state[fp16].keys() == {"master", "exp_avg", "exp_avg_sq", "step"}
    for parameter in (bf16, fp16):
        master = optimizer.master_of(parameter)
        assert master.dtype == torch.float32
        assert not torch.equal(master, parameter.float())
        assert torch.equal(master.to(parameter.dtype), parameter)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_weight_that_is_written_to_takes_its_master_with_it(kernels):
    parameter = torch.nn.Parameter(torch.randn(200).bfloat16())
    optimizer = MasterAdamW([parameter], kernels=kernels, **HYPER)
    for step in range(3):
        draw_gradients([parameter], step)
        optimizer.step()
    for value in (0.0, 1.5):
        with torch.no_grad():
            parameter.fill_(value)
        master = optimizer.master_of(parameter)
        torch.testing.assert_close(master, torch.full_like(master, value), rtol=2**-8, atol=1e-38)
        draw_gradients([parameter], 3)
        optimizer.step()
        assert (parameter - value).abs().max() < 10 * HYPER["lr"]


def test_a_state_with_whole_masters_goes_on_with_them():
    """As versions before 2026-11-29 have made them."""
    ours = parameters_of(torch.bfloat16)
    optimizer = MasterAdamW(ours, **HYPER)
    draw_gradients(ours, 0)
    optimizer.step()
    expected = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    whole = copy.deepcopy(optimizer.state_dict())
    for number, p in enumerate(ours):
        whole["state"][number]["master"] = optimizer.master_of(p)
        del whole["state"][number]["remainder"]
    other = MasterAdamW(expected, **HYPER)
    other.load_state_dict(whole)
    for parameters, taking in ((ours, optimizer), (expected, other)):
        draw_gradients(parameters, 1)
        taking.step()
    for p, q in zip(ours, expected, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.master_of(p), other.master_of(q))


def test_updates_below_bf16_resolution_add_up():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight[0].item() == pytest.approx(0.99, abs=4e-3)


def test_a_parameter_without_gradient_is_left_alone():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    MasterAdamW([weight]).step()
    assert torch.equal(weight, torch.ones(4, dtype=torch.bfloat16))


def test_gradients_accumulate_in_fp32():
    module = torch.nn.Linear(3, 3, bias=False).bfloat16()
    accumulate_gradients_in_fp32(module)
    for _ in range(300):
        (module.weight * 1.0).sum().backward()
    assert module.weight.grad.dtype == torch.float32
    assert torch.equal(module.weight.grad, torch.full((3, 3), 300.0))  # bf16 would stop at 256


def test_closure_is_run():
    weight = torch.nn.Parameter(torch.ones(2))

    def closure():
        loss = weight.sum()
        loss.backward()
        return loss.item()

    assert MasterAdamW([weight]).step(closure) == 2.0


def parameters_of(dtype: torch.dtype, device: str = "cpu") -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(7, 5), (33,), (), (64, 3)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def two_groups(parameters) -> list[dict]:
    return [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0, "lr": 2e-2}]


def draw_gradients(parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_masters_it_is_torchs(dtype, device):
    ours, torchs = parameters_of(dtype, device), parameters_of(dtype, device)
    a = FusedAdamW(two_groups(ours), **HYPER)
    b = torch.optim.AdamW(two_groups(torchs), fused=True, **HYPER)
    for step in range(5):
        for parameters, optimizer in ((ours, a), (torchs, b)):
            draw_gradients(parameters, step)
            optimizer.step()
    on_device = (1e-6, 1e-7) if dtype == torch.float32 else (2e-2, 1e-3)
    rtol, atol = (0, 0) if device == "cpu" else on_device  # the reference is torch's own
    for p, q in zip(ours, torchs, strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)
        assert a.state[p].keys() == b.state[q].keys()
        assert all(a.state[p][slot].dtype == b.state[q][slot].dtype for slot in a.state[p])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", OURS)
def test_a_state_dict_resumes_bit_for_bit(kind, device):
    cls, dtype = OURS[kind]
    straight = parameters_of(dtype, device)
    a = cls(two_groups(straight), **HYPER)
    for step in range(3):
        draw_gradients(straight, step)
        a.step()
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in straight]
    b = cls(two_groups(resumed), **HYPER)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for step in range(3, 6):
        for parameters, optimizer in ((straight, a), (resumed, b)):
            draw_gradients(parameters, step)
            optimizer.step()
    for p, q in zip(straight, resumed, strict=True):
        assert torch.equal(p, q)
        for slot, value in a.state[p].items():
            assert b.state[q][slot].dtype == value.dtype
            assert torch.equal(b.state[q][slot], value)


def test_what_is_loaded_is_a_copy():
    saver, loader = (MasterAdamW(parameters_of(torch.bfloat16), **HYPER) for _ in range(2))
    draw_gradients(saver.param_groups[0]["params"], 0)
    saver.step()
    loader.load_state_dict(saver.state_dict())
    before = copy.deepcopy(saver.state_dict())
    draw_gradients(loader.param_groups[0]["params"], 1)
    loader.step()
    for slot, value in before["state"][0].items():
        assert torch.equal(value, saver.state_dict()["state"][0][slot])


def test_a_state_of_torchs_unfused_adamw_goes_on():
    ours, torchs = parameters_of(torch.float32), parameters_of(torch.float32)
    b = torch.optim.AdamW(torchs, foreach=False, **HYPER)
    draw_gradients(torchs, 0)
    b.step()
    a = FusedAdamW(ours, **HYPER)
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    for p, q in zip(ours, torchs, strict=True):
        p.data.copy_(q)
    for parameters, optimizer in ((ours, a), (torchs, b)):
        draw_gradients(parameters, 1)
        optimizer.step()
    for p, q in zip(ours, torchs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", OURS)
def test_clipping_is_a_factor_of_the_step(kind, device):
    cls, dtype = OURS[kind]
    factored, scaled = parameters_of(dtype, device), parameters_of(dtype, device)
    a, b = cls(factored, **HYPER), cls(scaled, **HYPER)
    draw_gradients(factored, 0)
    draw_gradients(scaled, 0)
    a.gradient_factor = torch.tensor(0.5, device=device)
    for p in scaled:
        p.grad *= 0.5
    kept = [p.grad.clone() for p in factored]
    a.step()
    b.step()
    assert all(torch.equal(p, q) for p, q in zip(factored, scaled, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(factored, kept, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", OURS)
def test_a_skipped_step_leaves_everything(kind, device):
    cls, dtype = OURS[kind]
    parameters = parameters_of(dtype, device)
    optimizer = cls(parameters, **HYPER)
    draw_gradients(parameters, 0)
    optimizer.step()
    weights, state = [p.detach().clone() for p in parameters], copy.deepcopy(optimizer.state_dict()["state"])
    for p in parameters:
        p.grad.fill_(float("nan"))
    optimizer.skip = torch.tensor(True, device=device)
    optimizer.zeroes_gradients = True
    optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(parameters, weights, strict=True))
    for key, slots in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[key][slot]) for slot, value in slots.items())
    assert not any(p.grad.any() for p in parameters)


def test_a_copied_optimizer_steps():
    optimizer = copy.deepcopy(FusedAdamW(parameters_of(torch.float32), **HYPER))
    parameters = optimizer.param_groups[0]["params"]
    draw_gradients(parameters, 0)
    before = parameters[0].detach().clone()
    optimizer.step()
    assert not torch.equal(parameters[0], before)


def test_the_kernel_is_taken_where_asked_for(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    parameters = parameters_of(torch.float32)
    draw_gradients(parameters, 0)
    with pytest.raises(ValueError, match="kernels='triton', but adamw was given a tensor on cpu"):
        FusedAdamW(parameters, kernels="triton").step()
    FusedAdamW(parameters, kernels="triton", fused=False).step()


def arguments(tmp_path, **changes) -> NeoXTrainingArguments:
    return NeoXTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **changes)


def test_bf16_takes_adamw_with_masters(tmp_path):
    stock = (torch.optim.AdamW, {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True})
    cls, kwargs = optimizer_class(arguments(tmp_path, precision="bf16"), stock)
    assert cls is MasterAdamW
    assert kwargs == {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True, "kernels": "auto"}


@pytest.mark.parametrize("precision", ["fp32", "amp", "pure_bf16"])
def test_weights_that_are_their_own_masters(tmp_path, precision):
    stock = (torch.optim.AdamW, {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True})
    cls, kwargs = optimizer_class(arguments(tmp_path, precision=precision), stock, "torch")
    assert (cls, kwargs) == (FusedAdamW, {**stock[1], "kernels": "torch"})
    unfused = arguments(tmp_path, precision=precision, optim="adamw_torch")
    assert optimizer_class(unfused, stock) == stock


def test_on_disk_it_has_torchs_name():
    assert FusedAdamW.__name__ == torch.optim.AdamW.__name__


def test_bf16_refuses_other_optimizers(tmp_path):
    with pytest.raises(RecipeError, match=r"'adafactor' has no fp32 master weights.*adamw_torch_fused"):
        optimizer_class(arguments(tmp_path, precision="bf16", optim="adafactor"), (torch.optim.SGD, {}))


@pytest.mark.parametrize("optimizer_type", [FusedAdamW, MasterAdamW])
@pytest.mark.parametrize("max_norm", [1e-2, 1e9])
def test_clipping_in_the_step_is_clipping_before_it(optimizer_type, max_norm):
    dtype = torch.float32 if optimizer_type is FusedAdamW else torch.bfloat16
    weights = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((5, 3), (7,))]
    others = [nn.Parameter(weight.detach().clone()) for weight in weights]
    optimizer, other = optimizer_type(weights, kernels="triton"), optimizer_type(others, kernels="triton")
    for _ in range(3):
        for weight, same in zip(weights, others, strict=True):
            weight.grad = torch.randn(weight.shape).to(dtype)
            same.grad = weight.grad.clone()
        norm = optimizer.clip_in_step(max_norm)
        wanted = nn.utils.clip_grad_norm_(others, max_norm)
        torch.testing.assert_close(norm.to(wanted.dtype), wanted)
        optimizer.step()
        other.step()
    for weight, same in zip(weights, others, strict=True):
        torch.testing.assert_close(weight, same, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)


def test_a_norm_that_is_not_finite_changes_nothing():
    weight = nn.Parameter(torch.ones(4))
    optimizer = FusedAdamW([weight], kernels="triton")
    weight.grad = torch.tensor([1.0, math.inf, 1.0, 1.0])
    assert optimizer.clip_in_step(1.0).isinf()
    optimizer.step()
    assert weight.tolist() == [1.0] * 4


def test_where_torch_takes_the_step_torch_clips():
    weight = nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    assert FusedAdamW([weight], kernels="torch").clip_in_step(1.0) is None
    assert FusedAdamW([weight], kernels="triton", fused=False).clip_in_step(1.0) is None
