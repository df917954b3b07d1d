"""Weights to start from that do not know the layout.

The values of a parameter are a function of the seed and of its name: every rank draws the whole tensor from a generator
of that tensor's own, and keeps its share. So any tensor and pipeline sizes begin with one and the same model, and no
rank ever holds more of it than its own shares and one whole tensor.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from neox_hf.modeling.initialization import weight_draw
from neox_hf.modeling.model import GPTNeoXPreTrainedModel
from neox_hf.parallel.shards import Shard, shards_of


@torch.no_grad()
def draw_weights(
    model: GPTNeoXPreTrainedModel,
    seed: int,
    device: torch.device | str,
    local: Iterable[nn.Module] | None = None,
) -> None:
    """Give a model its first weights. Parameters on the meta device are replaced by new ones on `device`; those that
    have memory already are overwritten where they are.

    Matrices are drawn by the methods that the configuration names, in fp32 and then rounded to the parameter's dtype;
    norms start as identities and biases at zero; buffers are computed again from the configuration. Default generators
    are left as they were. A generator of the CPU and one of a CUDA device draw different numbers.

    seed: any integer. local: the modules that this rank runs, if not all; the rest of the model stays as it is. A
    parameter that is tied to a local one is local, and stays tied.
    """
    modules = list(model.modules()) if local is None else [part for module in local for part in module.modules()]
    wanted = {id(tensor) for module in modules for tensor in module.parameters(recurse=False)}
    shards, owners = shards_of(model), _owners(model)
    drawn: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in wanted:
            real = _replacement(parameter, device) if parameter.is_meta else parameter
            _fill(real.data, owners[id(parameter)], name, model, seed, shards.get(parameter))
            drawn[id(parameter)] = real
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in drawn:
                module._parameters[name] = drawn[id(parameter)]
    for module in modules:
        _compute_buffers(module, model, device)


def _owners(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """The module of each parameter, and its name there; the first of them where it is tied."""
    owners: dict[int, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), (module, name))
    return owners


def _fill(
    values: Tensor,
    owner: tuple[nn.Module, str],
    name: str,
    model: GPTNeoXPreTrainedModel,
    seed: int,
    shard: Shard | None,
) -> None:
    """This rank's share of the parameter called `name` in the model, into `values`."""
    module, role = owner
    if role == "bias" or isinstance(module, nn.LayerNorm):
        values.fill_(0.0 if role == "bias" else 1.0)
        return
    assert isinstance(module, nn.Linear | nn.Embedding), f"{name}: no way to start a {type(module).__name__}"
    precise = torch.promote_types(values.dtype, torch.float32)
    whole = torch.empty(values.shape if shard is None else shard.shape, dtype=precise, device=values.device)
    with _generator_of(seed, name, values.device):
        weight_draw(module, model.config)(whole)
    if shard is None:
        values.copy_(whole)
    else:
        values.zero_()
        shard.real(values).copy_(shard.cut(whole))


@contextmanager
def _generator_of(seed: int, name: str, device: torch.device) -> Iterator[None]:
    """Default generators that depend on (seed, name) alone, until the context ends."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        yield


def _replacement(parameter: nn.Parameter, device: torch.device | str) -> nn.Parameter:
    """A parameter with memory, marked as the old one was."""
    new = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
    new.__dict__.update(parameter.__dict__)
    return new


def _compute_buffers(module: nn.Module, model: GPTNeoXPreTrainedModel, device: torch.device | str) -> None:
    missing = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
    for name in missing:
        module._buffers[name] = torch.full_like(module._buffers[name], torch.nan, device=device)
    if missing:
        model._init_weights(module)
        assert not any(module._buffers[name].isnan().any() for name in missing), f"{type(module).__name__}: {missing}"
