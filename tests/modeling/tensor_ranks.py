"""A whole model, its shards on the ranks of a tensor group, and what of them is compared."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neox_hf import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_hf.parallel import Topology, shards_of
from tests.modeling.small import SMALL

UNEVEN = SMALL | {"vocab_size": 150}
"""Two ranks pad the vocabulary to 256 rows, four to 512: the last two ranks hold nothing real."""


@dataclass
class Layout:
    """How a model is split, and which model it is. Travels to the ranks."""

    tensor: int
    sequence: bool = False
    fields: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def whole(self) -> GPTNeoXForCausalLM:
        """The model of one process: every parameter drawn at random, norms and biases too."""
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**(UNEVEN | self.fields)))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + centre)
        return model.to(self.dtype)

    def of_rank(self, rank: int) -> GPTNeoXForCausalLM:
        """This rank's shards of the whole model."""
        whole = self.whole()
        topology = Topology.from_world(self.tensor, rank, tensor=self.tensor, sequence=self.sequence).connect()
        model = GPTNeoXForCausalLM(whole.config, topology).to(self.dtype)
        shards = shards_of(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                value = whole.get_parameter(name)
                if parameter in shards:
                    parameter.zero_()
                    shards[parameter].real(parameter).copy_(shards[parameter].cut(value))
                else:
                    parameter.copy_(value)
        return model


@dataclass
class Pass:
    """What one rank saw of a training step."""

    loss: Tensor
    gradients: dict[str, Tensor]
    pieces: dict[str, tuple[int, Tensor]]
    residuals: list[Tensor]


def batch(
    rows: int = 2, length: int = 16, packed: bool = False, vocabulary: int = UNEVEN["vocab_size"]
) -> dict[str, Tensor]:
    """Random tokens, some of them without a label."""
    tokens = torch.randint(0, vocabulary, (rows, length + 1), generator=torch.Generator().manual_seed(2))
    labels = tokens[:, 1:].clone()
    labels[0, 3:5] = -100
    made = {"input_ids": tokens[:, :-1], "shift_labels": labels}
    if packed:
        made["position_ids"] = torch.cat((torch.arange(6), torch.arange(length - 6))).repeat(rows, 1)
    return made


def train_pass(model: GPTNeoXForCausalLM, inputs: dict[str, Tensor]) -> Pass:
    """Forward and backward pass, each layer's output recorded."""
    residuals: list[Tensor] = []
    for layer in model.gpt_neox.layers:
        layer.register_forward_hook(lambda module, args, output: residuals.append(output.detach()))
    loss = model.train()(**inputs, use_cache=False).loss
    loss.backward()
    shards = shards_of(model)
    whole, pieces = {}, {}
    for name, parameter in model.named_parameters():
        if parameter in shards:
            shard = shards[parameter]
            assert not shard.padding(parameter.grad).any(), f"{name}: padding has a gradient"
            pieces[name] = (shard.dim, shard.real(parameter.grad))
        else:
            whole[name] = parameter.grad
    return Pass(loss.detach(), whole, pieces, residuals)


def joined(passes: list[Pass], name: str) -> Tensor:
    """A parameter's gradient, put together from all ranks; whole ones must agree bit for bit."""
    first = passes[0]
    if name in first.pieces:
        return torch.cat([one.pieces[name][1] for one in passes], dim=first.pieces[name][0])
    for other in passes[1:]:
        assert torch.equal(other.gradients[name], first.gradients[name]), f"{name} differs between ranks"
    return first.gradients[name]
