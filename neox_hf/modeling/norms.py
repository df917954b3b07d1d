"""Layer norms of the block: one alone, or two of the same input at once."""

from torch import Tensor, nn

from neox_hf.kernels import dual_layer_norm, layer_norm
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.parallel import ALONE, TensorRegion


class GPTNeoXLayerNorm(nn.LayerNorm):
    """Layer norm over the hidden size, computed by `kernels.layer_norm`.

    It stands inside the tensor region: gradients that reach it are partial, and so are those of its parameters.
    """

    def __init__(self, config: GPTNeoXConfig, region: TensorRegion = ALONE) -> None:
        super().__init__(config.hidden_size, eps=config.layer_norm_eps)
        self.kernels = config.kernels
        self.region = region

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight, bias = self.region.shared(self.weight, self.bias)
        return layer_norm(hidden_states, weight, bias, self.eps, backend=self.kernels)


def normalize_twice(first: nn.Module, second: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """`first(x), second(x)`, in one op where nothing is attached to either norm."""
    if not (is_bare(first) and is_bare(second) and first.eps == second.eps):
        return first(hidden_states), second(hidden_states)
    affines = first.region.shared(first.weight, first.bias, second.weight, second.bias)
    return dual_layer_norm(hidden_states, *affines, first.eps, backend=first.kernels)


def is_bare(norm: nn.Module) -> bool:
    """Whether reading the norm's parameters is the same as calling it.

    It is not when an adapter has replaced it, when a hook watches it, or when accelerate's offloading brings its
    weights to the device only as it is called.
    """
    hooks = (norm._forward_pre_hooks, norm._forward_hooks, norm._backward_pre_hooks, norm._backward_hooks)
    return type(norm) is GPTNeoXLayerNorm and not any(hooks) and not hasattr(norm, "_hf_hook")
