"""quack's products and their ends stood in for, on the host: what its epilogues are told is what is computed."""

import math

import torch
from torch.nn import functional as F


class DSLBaseError(Exception):
    """What a compilation fails with."""


class End:
    """One epilogue. tiles: the sizes of each launch. fails: what a launch raises. off: what is added to the result."""

    def __init__(self, compute):
        self.compute, self.tiles, self.fails, self.off = compute, [], {}, {}

    def gemm(self, a, b, out, c=None, *, epi_args, tile_M, tile_N, pingpong, cluster_M, cluster_N):
        tile = f"{tile_M}x{tile_N} {cluster_M}x{cluster_N}"
        if tile in self.fails:
            raise self.fails[tile]
        self.tiles.append(tile)
        assert pingpong
        assert a.shape[1] == b.shape[1]
        assert out.shape == (a.shape[0], b.shape[0])
        results = self.compute(a.float() @ b.float().t(), c, epi_args)
        out.copy_(results.pop("D") + self.off.get(tile, 0))
        for name, values in results.items():
            place = epi_args[name]
            if name == "dbias":
                parts = values.split(tile_M)
                assert place.shape == (len(parts), values.shape[1])
                values = torch.stack([part.sum(0) for part in parts])
            if name == "total":
                parts = values.split(tile_N, dim=1)
                assert place.shape == (values.shape[0], len(parts))
                values = torch.stack([part.sum(1) for part in parts], dim=1)
            place.copy_(values)


def gelu(form):
    def compute(acc, c, arguments):
        return {"D": acc, "y": F.gelu(acc + arguments["bias"].float(), approximate=form)}

    return compute


def gelu_backward(form):
    def compute(acc, c, arguments):
        with torch.enable_grad():
            z = (c.float() + arguments["bias"].float()).requires_grad_()
            y = F.gelu(z, approximate=form)
            (dz,) = torch.autograd.grad(y, z, acc)
        return {"D": dz, "dbias": dz} | ({"y": y.detach()} if "y" in arguments else {})

    return compute


def powers(acc, c, arguments):
    assert arguments["reference"].shape == (1, acc.shape[0])
    power = (acc * math.log2(math.e) - arguments["reference"].t()).exp2()
    return {"D": power, "total": power}


def add(acc, c, arguments):
    return {"D": acc + c.float() + sum(arguments[name].float() for name in ("branch", "bias1", "bias2"))}


class Epilogues:
    """What `neox_hf.kernels.quack_epilogues` has."""

    DSLBaseError = DSLBaseError

    def __init__(self):
        for form, torch_s in (("erf", "none"), ("tanh", "tanh")):
            setattr(self, f"{form}_gelu", End(gelu(torch_s)))
            setattr(self, f"{form}_gelu_backward", End(gelu_backward(torch_s)))
            setattr(self, f"{form}_gelu_backward_again", End(gelu_backward(torch_s)))
        self.residual = End(add)
        self.powers = End(powers)
