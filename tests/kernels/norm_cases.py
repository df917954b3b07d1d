"""Norms by Triton beside torch's at the same dtype, both held against fp64: on the CPU in the interpreter, on a GPU
compiled."""

import torch

from neox_hf import kernels

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(x, weight, bias=None):
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / ((centred**2).mean(-1, keepdim=True) + EPS).sqrt()
    return normed * weight if bias is None else normed * weight + bias


def dual(x, weight1, bias1, weight2, bias2):
    return layer(x, weight1, bias1), layer(x, weight2, bias2)


def rms(x, weight, measured=None):
    return x / ((x[..., :measured] ** 2).mean(-1, keepdim=True).sqrt() + EPS) * weight


def scale(x, g):
    return g * x / (x**2).sum(-1, keepdim=True).sqrt().clamp(min=EPS)


def added(x, first, second):
    return x + first if second is None else x + first + second


TRUTHS = {
    "layer_norm": layer,
    "residual_layer_norm": lambda x, *affine: (x, layer(x, *affine)),
    "add_layer_norm": lambda x, a, b, *affine: (added(x, a, b), layer(added(x, a, b), *affine)),
    "dual_layer_norm": dual,
    "residual_dual_layer_norm": lambda x, *affines: (x, *dual(x, *affines)),
    "add_dual_layer_norm": lambda x, a, b, *affines: (added(x, a, b), *dual(added(x, a, b), *affines)),
    "rms_norm": rms,
    "scale_norm": scale,
}
NAMES = list(TRUTHS)


def inputs_of(name, shape, dtype, *, weight_dtype=None, device="cpu", biased=True, branches=2):
    """Rows with a mean, branches, and affines, as op `name` takes them."""

    def random(*size):
        return torch.randn(size, device=device)

    made = [(random(*shape) * 2 + 1).to(dtype)]
    if name.startswith("add"):
        made += [random(*shape).to(dtype) if place < branches else None for place in range(2)]
    affines = [random(1 if name == "scale_norm" else shape[-1]).to(weight_dtype or dtype) for _ in range(4)]
    if name in ("rms_norm", "scale_norm"):
        return [*made, affines[0]]
    affines = [affine if biased or place % 2 == 0 else None for place, affine in enumerate(affines)]
    return [*made, *affines[: 4 if "dual" in name.split("_") else 2]]


def run(function, inputs, seed=1):
    """Values, and the gradients of all tensors among the inputs, of a random weighing of the values."""
    leaves = [x if x is None else x.detach().clone(memory_format=torch.preserve_format) for x in inputs]
    leaves = [x if x is None else x.requires_grad_() for x in leaves]
    values = function(*leaves)
    values = values if isinstance(values, tuple) else (values,)
    generator = torch.Generator().manual_seed(seed)
    weighing = [torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y) for y in values]
    torch.autograd.backward(values, weighing)
    return [*(y.detach() for y in values), *(x.grad for x in leaves if x is not None)]


def check(name, inputs, **options):
    """No result of the kernel is further from fp64 than torch's, by the norm of its error.

    Not by the largest error, which among a million roundings is chance: of a norm after a sum, which the kernel rounds
    once and torch twice, it was up to 1.25 times torch's where the norm was 0.83 to 0.93 of it. Of n numbers the ratio
    of two such norms is uncertain by less than 0.7 / sqrt(n); three times that is allowed. In bf16 on the CPU a last
    place is allowed, as the interpreter cuts off and does not round.
    """
    op, settings = getattr(kernels, name), {key: value for key, value in options.items() if value is not None}
    ours = run(lambda *given: op(*given, EPS, backend="triton", **settings), inputs)
    theirs = run(lambda *given: op(*given, EPS, backend="torch", **settings), inputs)
    exact = [x if x is None else x.double() for x in inputs]
    truth = run(lambda *given: TRUTHS[name](*given, **settings), exact)
    for place, (a, b, wanted) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{name} {place}"
        error, theirs, size = (each.norm() for each in (a.double() - wanted, b.double() - wanted, wanted))
        allowed = (1.05 + 2 * max(wanted.numel(), 1) ** -0.5) * theirs + 1e-6 * size
        if a.device.type == "cpu" and torch.bfloat16 in {x.dtype for x in inputs if x is not None}:
            allowed = 2**-7 * size
        assert error <= allowed, f"{name} {place}: {error:.3e}, torch {theirs:.3e}, of {size:.3e}"
