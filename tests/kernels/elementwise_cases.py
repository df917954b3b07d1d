"""Kernels beside torch at the same dtype, both held against fp64: on the CPU in the interpreter, on a GPU compiled."""

import torch
from torch.nn import functional as F

from neox_hf.kernels import bias_dropout_residual, bias_gelu, causal_softmax
from neox_hf.kernels.column_sums import column_sums

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(function, inputs, dy):
    """Value and the gradients of all tensors among the inputs."""
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(x.grad for x in leaves if x is not None)]


def assert_no_further_from_truth(ours, theirs, truth):
    """The worst error is torch's at most; in bf16 on the CPU a last place, as the interpreter cuts off, not rounds."""
    for place, (a, b, exact) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), place
        error, allowed = ((value.double() - exact).abs().max() for value in (a, b))
        largest = exact.abs().max()
        if a.dtype == torch.bfloat16 and a.device.type == "cpu":
            allowed = 2**-6 * largest
        assert error <= 1.05 * allowed + 1e-6 * largest, f"{place}: {error:.3e}, allowed {allowed:.3e}"


def check_bias_gelu(device, shape, dtype, form, with_bias):
    x = (torch.randn(shape, device=device) * 3).to(dtype)
    bias = torch.randn(shape[-1], device=device).to(dtype) if with_bias else None
    dy = torch.randn(shape, device=device).to(dtype)
    truth = run(lambda *a: written_out_gelu(*a, form), [v if v is None else v.double() for v in (x, bias)], dy)
    ours = run(lambda *a: bias_gelu(*a, form, backend="triton"), (x, bias), dy)
    theirs = run(lambda *a: bias_gelu(*a, form, backend="torch"), (x, bias), dy)
    assert_no_further_from_truth(ours, theirs, truth)


def written_out_gelu(x, bias, form):
    return F.gelu(x if bias is None else x + bias, approximate={"erf": "none", "tanh": "tanh"}[form])


def branches(device, shape, dtype, count, with_bias):
    """x, first, bias1, second, bias2."""
    made = [torch.randn(shape, device=device).to(dtype)]
    for place in range(2):
        made.append(torch.randn(shape, device=device).to(dtype) if place < count else None)
        made.append(torch.randn(shape[-1], device=device).to(dtype) if place < count and with_bias else None)
    return made


def check_bias_residual(device, shape, dtype, count, with_bias):
    inputs = branches(device, shape, dtype, count, with_bias)
    dy = torch.randn(shape, device=device).to(dtype)
    truth = run(lambda *a: sum(v for v in a if v is not None), [v if v is None else v.double() for v in inputs], dy)
    ours = run(lambda *a: bias_dropout_residual(*a, backend="triton"), inputs, dy)
    theirs = run(lambda *a: bias_dropout_residual(*a, backend="torch"), inputs, dy)
    assert_no_further_from_truth(ours, theirs, truth)


def check_dropout(device, shape, dtype, count, probability, seed):
    """The masks are read off the gradients, and have to be those of the forward pass."""
    inputs = branches(device, shape, dtype, count, with_bias=True)
    dy = torch.where(torch.randn(shape, device=device) > 0, 1.5, -1.25).to(dtype)  # never zero, even divided
    got = run(lambda *a: bias_dropout_residual(*a, probability, seed, backend="triton"), inputs, dy)
    masks = [gradient != 0 for gradient in got[2::2]]
    kept = torch.stack([mask.double().mean() for mask in masks])
    spread = (probability * (1 - probability) / dy.numel()) ** 0.5
    assert ((kept - (1 - probability)).abs() <= 5 * spread).all()

    def written_out(x, *rest):
        pairs = zip(rest[::2], rest[1::2], masks if count == 2 else [*masks, None], strict=True)
        return x + sum((v + b) * mask / (1 - probability) for v, b, mask in pairs if v is not None)

    truth = run(written_out, [v if v is None else v.double() for v in inputs], dy)
    theirs = [exact.to(dtype) for exact in truth]
    assert_no_further_from_truth(got, theirs, truth)
    return masks


def check_column_sums(device, shape, dtype):
    x = torch.randn(shape, device=device).to(dtype)
    exact = x.double().flatten(0, -2).sum(0)
    sums = column_sums(x, torch.float32)
    assert sums.dtype == torch.float32
    theirs = x.flatten(0, -2).sum(0, dtype=torch.float32)
    assert_no_further_from_truth([sums], [theirs], [exact])


def check_causal_softmax(device, shape, dtype, mask_shape, overwrite):
    """Beside torch's softmax of the same dtype, which keeps its rounded result for the gradient too."""
    scores = (torch.randn(shape, device=device) * 3).to(dtype)
    mask = None if mask_shape is None else torch.randn(mask_shape, device=device)
    dy = torch.randn(shape, device=device).to(dtype)
    queries, keys = shape[-2:]
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(keys - queries + 1)

    def written_out(z):
        z = z * 0.3 if mask is None else (z * 0.3 + mask).to(z.dtype)
        return F.softmax(z.masked_fill(hidden, -torch.inf), dim=-1)

    def by_kernel(z):
        # Not a leaf, as the scores of an attention never are: those may be overwritten.
        return causal_softmax(z.clone(), 0.3, mask, overwrite=overwrite, backend="triton")

    ours, theirs = run(by_kernel, [scores], dy), run(written_out, [scores], dy)
    assert_no_further_from_truth(ours, theirs, run(written_out, [scores.double()], dy))
    assert all((value.masked_select(hidden) == 0).all() for value in ours)
