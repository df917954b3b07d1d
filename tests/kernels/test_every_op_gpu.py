"""Tensors may lie in memory as they like, on a GPU, for every op that has gradients.

Attention is not tried on heads that are cut out: torch's own kernels refuse addresses that are not multiples of 16
bytes, and heads of a projection never lie so. Nor is head and loss, in half precision, on rows that are all the same:
their gradient is a sum that comes to nothing, of which no rounding is a small part.
"""

import pytest
import torch

from tests.kernels.every_op_cases import SAMPLES, Sizes, check_layout, inputs
from tests.kernels.layouts import LAYOUTS, laid_out

pytestmark = pytest.mark.gpu

AS_IN_TRAINING = Sizes(batch=4, tokens=48, width=256, head=64)
"""A head size that FlashAttention 4 takes, where it is installed."""

REFUSED = ("causal_attention", "cut out")
CANCELS = ("linear_cross_entropy", "expanded")


def but_for(*left_out: tuple[str, str]) -> pytest.MarkDecorator:
    """Every op in every layout."""
    tried = [(name, layout) for name in SAMPLES for layout in LAYOUTS]
    return pytest.mark.parametrize(("name", "layout"), [pair for pair in tried if pair not in left_out])


@but_for(REFUSED)
def test_tensors_may_lie_in_memory_as_they_like(name, layout):
    check_layout(name, [laid_out(layout, x) for x in inputs(name, device="cuda")], layout, "triton", 2e-5)


@but_for(REFUSED, CANCELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_so_they_may_in_half_precision(name, layout, dtype):
    given = [laid_out(layout, x.to(dtype)) for x in inputs(name, AS_IN_TRAINING, "cuda")]
    check_layout(name, given, layout, "triton", torch.finfo(dtype).eps)
