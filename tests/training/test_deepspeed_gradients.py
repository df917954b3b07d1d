"""Products of weights' gradients, added where DeepSpeed's optimizer sums."""

from types import SimpleNamespace

import torch
from torch import nn

from neox_hf.training.deepspeed_gradients import SumInMasterGradient


def test_a_product_is_added_to_the_sum_and_the_optimizer_is_told():
    sums = [torch.zeros(3), torch.ones(24)]
    optimizer = SimpleNamespace(fp32_groups_gradients=[sums], fp32_groups_has_gradients=[[False, False]])
    weight = nn.Parameter(torch.zeros(4, 6).bfloat16())
    total = SumInMasterGradient(optimizer, 0, 1)
    gradient, x = torch.randn(5, 4).bfloat16(), torch.randn(5, 6).bfloat16()
    expected = gradient.float().t() @ x.float()
    total.add_product(weight, gradient, x)
    torch.testing.assert_close(sums[1], 1 + expected.flatten())
    assert optimizer.fp32_groups_has_gradients == [[False, True]]
    assert weight._hp_grad is sums[1]

    def add(into: torch.Tensor, keep: bool) -> None:
        assert keep
        into.add_(expected)

    total.add_by(weight, add)
    torch.testing.assert_close(sums[1], 1 + 2 * expected.flatten())
