"""Layer norms of the block: one alone, or two of the same input at once."""

from torch import Tensor, nn

from neox_hf.kernels import layer_norm, residual_dual_layer_norm, residual_layer_norm
from neox_hf.modeling.bare import is_bare
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.parallel import ALONE, TensorRegion


class GPTNeoXLayerNorm(nn.LayerNorm):
    """Layer norm over the hidden size, computed by `kernels.layer_norm`.

    It stands inside the tensor region: gradients that reach it are partial, and so are those of its parameters.

    makes_again: its result is not kept for the backward pass, which makes it again; see `recompute_selectively`.
    """

    def __init__(self, config: GPTNeoXConfig, region: TensorRegion = ALONE) -> None:
        super().__init__(config.hidden_size, eps=config.layer_norm_eps)
        self.kernels = config.kernels
        self.region = region
        self.makes_again = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight, bias = self.region.shared(self.weight, self.bias)
        return layer_norm(hidden_states, weight, bias, self.eps, backend=self.kernels)


def affines_of(*norms: nn.Module) -> tuple[Tensor, ...]:
    """Weight and bias of each, where one op may compute all of them; else none: each has to be called."""
    bare = all(is_bare(norm, GPTNeoXLayerNorm) for norm in norms)
    if not (bare and all(norm.eps == norms[0].eps for norm in norms)):
        return ()
    return tuple(parameter for norm in norms for parameter in (norm.weight, norm.bias))


def normalize(norm: nn.Module, affine: tuple[Tensor, ...], hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """`x, norm(x)`. The x that comes back is for the residual stream: gradients of both meet in one op.

    affine: of `affines_of`, as it is inside the region.
    """
    if not affine:
        return hidden_states, norm(hidden_states)
    return residual_layer_norm(hidden_states, *affine, norm.eps, makes_again=norm.makes_again, backend=norm.kernels)


def normalize_twice(
    first: nn.Module, second: nn.Module, affines: tuple[Tensor, ...], hidden_states: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`x, first(x), second(x)`, in one op where nothing is attached to either norm; see `normalize`."""
    if not affines:
        return hidden_states, first(hidden_states), second(hidden_states)
    return residual_dual_layer_norm(
        hidden_states, *affines, first.eps, makes_again=first.makes_again, backend=first.kernels
    )
