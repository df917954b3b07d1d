"""fp32 master weights: small updates survive, and the arithmetic is torch's AdamW."""

import pytest
import torch

from neox_hf.errors import RecipeError
from neox_hf.parallel.data_parallel import accumulate_gradients_in_fp32
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.optimizers import MasterAdamW, optimizer_class

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
    torch.testing.assert_close(ours.state[low]["master"], full.detach(), rtol=1e-6, atol=1e-7)
    assert torch.equal(low, ours.state[low]["master"].bfloat16())


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


def arguments(tmp_path, **changes) -> NeoXTrainingArguments:
    return NeoXTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **changes)


def test_bf16_takes_adamw_with_masters(tmp_path):
    stock = (torch.optim.AdamW, {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True})
    assert optimizer_class(arguments(tmp_path, precision="fp32"), stock) == stock
    cls, kwargs = optimizer_class(arguments(tmp_path, precision="bf16"), stock)
    assert cls is MasterAdamW
    assert kwargs == {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True}


def test_bf16_refuses_other_optimizers(tmp_path):
    with pytest.raises(RecipeError, match=r"'adafactor' has no fp32 master weights.*adamw_torch_fused"):
        optimizer_class(arguments(tmp_path, precision="bf16", optim="adafactor"), (torch.optim.SGD, {}))
