"""Weight gradients straight into the fp32 sums of DeepSpeed's BF16_Optimizer.

By itself it takes each gradient in bf16, casts it and adds it; see `kernels.weight_gradient`.
"""

from dataclasses import dataclass
from functools import partial

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from neox_hf.kernels.weight_gradient import AddInto, add_product_, sum_in
from neox_hf.training.split_backward import PostponedProducts


@dataclass(frozen=True)
class SumInMasterGradient:
    """Adds products to the gradient of a parameter's master copy; `group` and `index` are its place there.

    postponed: takes the products of linears, which have no part in what the backward pass goes on with; None: none.
    """

    optimizer: BF16_Optimizer
    group: int
    index: int
    postponed: PostponedProducts | None = None

    def add_product(self, weight: nn.Parameter, gradient: Tensor, x: Tensor, backend: str = "auto") -> None:
        add = partial(add_product_, self.total(weight), gradient, x, backend=backend)
        if self.postponed is None:
            add()
        else:
            self.postponed.take(add)

    def add_by(self, weight: nn.Parameter, add: AddInto) -> None:
        add(self.total(weight), True)

    def resume(self, weight: nn.Parameter, total: Tensor) -> bool:
        self.total(weight)  # the optimizer keeps its sums where they are, and zeroes them
        return False

    def tell(self, weight: nn.Parameter) -> None:
        """Nobody: the optimizer's own hook is there for bf16 gradients, of which there is none."""

    def total(self, weight: nn.Parameter) -> Tensor:
        flat = self.optimizer.fp32_groups_gradients[self.group][self.index]
        # What the optimizer notes when a gradient reaches it in its own way.
        weight._hp_grad = flat
        self.optimizer.fp32_groups_has_gradients[self.group][self.index] = True
        return flat.view(weight.shape)


def sum_in_master_gradients(optimizer: object, postponed: PostponedProducts | None = None) -> None:
    """Have linears add their weights' gradients where `optimizer` sums them, if it is a BF16_Optimizer. postponed: of
    `SumInMasterGradient`."""
    if not isinstance(optimizer, BF16_Optimizer):
        return
    for group, parameters in enumerate(optimizer.bf16_groups):
        for index, parameter in enumerate(parameters):
            sum_in(parameter, SumInMasterGradient(optimizer, group, index, postponed))
