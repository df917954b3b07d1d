"""How matrices start: the methods of GPT-NeoX, by name.

Source: gpt-neox megatron/model/init_functions.py. Differs in one place: upstream's `orthogonal` passes a muP width
where the number of layers belongs; here its gain is sqrt(2), as for one layer.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

# transformers' wrappers leave alone what a checkpoint has filled already.
from transformers import initialization as guarded

from neox_hf.parallel import Sharded

if TYPE_CHECKING:
    from neox_hf.modeling.configuration import GPTNeoXConfig

Draw = Callable[[Tensor], Any]


def normal(std: float) -> Draw:
    """Draws from N(0, std^2)."""
    return partial(guarded.normal_, mean=0.0, std=std)


def orthogonal(layers: int) -> Draw:
    """A (semi-)orthogonal matrix times sqrt(2 / layers); Saxe et al., 2013, arXiv 1312.6120."""

    def draw(weight: Tensor) -> None:
        # QR knows no half precision.
        matrix = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        guarded.copy_(weight, nn.init.orthogonal_(matrix, gain=math.sqrt(2 / layers)))

    return draw


INIT_METHODS: dict[str, Callable[["GPTNeoXConfig"], Draw]] = {
    "normal": lambda config: normal(config.initializer_range),
    "scaled_normal": lambda config: normal(config.initializer_range / math.sqrt(2 * config.num_hidden_layers)),
    "single_residual_scaled_normal": lambda config: normal(
        config.initializer_range / math.sqrt(config.num_hidden_layers)
    ),
    # Nguyen and Salazar, 2019, arXiv 1910.05895
    "small_init": lambda config: normal(math.sqrt(2 / (5 * config.hidden_size))),
    # Wang and Komatsuzaki, 2021, GPT-J
    "wang_init": lambda config: normal(2 / config.num_hidden_layers / math.sqrt(config.hidden_size)),
    "orthogonal": lambda _: orthogonal(layers=1),
    "scaled_orthogonal": lambda config: orthogonal(layers=config.num_hidden_layers),
    # Glorot and Bengio, 2010
    "xavier_uniform": lambda _: guarded.xavier_uniform_,
    "xavier_normal": lambda _: guarded.xavier_normal_,
}


def output_layer(linear: nn.Linear) -> nn.Linear:
    """Mark a linear that writes into the residual stream; `output_layer_init_method` is its own."""
    linear.is_output_layer = True
    return linear


def weight_draw(module: nn.Linear | nn.Embedding, config: "GPTNeoXConfig") -> Draw:
    """The method that the configuration names for this matrix."""
    is_output = getattr(module, "is_output_layer", False)
    return INIT_METHODS[config.output_layer_init_method if is_output else config.init_method](config)


def initialize_matrix(module: nn.Linear | nn.Embedding, config: "GPTNeoXConfig") -> None:
    """Draw the weight by its method; a bias starts at zero."""
    weight_draw(module, config)(module.weight)
    if isinstance(module, Sharded):
        shard = module.shards()["weight"]
        shard.padding(module.weight).zero_()
    if getattr(module, "bias", None) is not None:
        guarded.zeros_(module.bias)
