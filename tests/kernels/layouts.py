"""Ways of a tensor to lie in memory."""

import torch

LAYOUTS = ["transposed", "stepped", "cut out", "expanded"]


def laid_out(layout: str, x: torch.Tensor) -> torch.Tensor:
    """Values of x, but for `expanded`, which has those of its first part."""
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "stepped":
        return torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2]
    if layout == "cut out":
        return torch.nn.functional.pad(x, (1, 2) * x.dim())[tuple(slice(1, 1 + size) for size in x.shape)]
    assert layout == "expanded"
    return x[:1].expand_as(x)


def far_apart(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x, whose last part of `dim` begins more than 2^31 elements behind its first. Memory that is not touched is not
    taken."""
    step = 2**31 // (x.shape[dim] - 1) + 8
    strides = list(x.contiguous().stride())
    strides[dim] = step
    room = torch.empty(sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True)) + 1, dtype=x.dtype)
    return room.as_strided(x.shape, strides).copy_(x)
