"""The feed-forward half of the block."""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from neox_hf.kernels import BIAS_GELU, bias_gelu, linear_gelu
from neox_hf.kernels.fp8_mlp import fp8_mlp
from neox_hf.kernels.linear_gelu import goes_on
from neox_hf.kernels.residual_mlp import MlpWeights, residual_mlp
from neox_hf.modeling.bare import is_bare
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.initialization import output_layer
from neox_hf.parallel import ALONE, BehindGelu, ColumnParallelLinear, Linear, TensorRegion, column_linear, row_linear

# transformers' names of the two forms of GELU. `gelu_fast` is GPT-NeoX-20B's.
GELU_FORMS = {"gelu": "erf", "gelu_fast": "tanh", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


class GPTNeoXMLP(nn.Module):
    """dense_4h_to_h(activation(dense_h_to_4h(x))), H -> F -> H. Each rank of the region computes some of the F."""

    def __init__(self, config: GPTNeoXConfig, region: TensorRegion = ALONE) -> None:
        super().__init__()
        region.share(config.intermediate_size, "intermediate_size")
        self.dense_h_to_4h = column_linear(config.hidden_size, config.intermediate_size, region, kernels=config.kernels)
        self.dense_4h_to_h = output_layer(
            row_linear(config.intermediate_size, config.hidden_size, region, kernels=config.kernels)
        )
        self.act = activation(config)

    def forward(self, hidden_states: Tensor, leave_bias: bool = False) -> Tensor:
        """leave_bias: the caller adds the bias of `dense_4h_to_h`."""
        if self._is_one_op_in_fp8:
            up, down = self.dense_h_to_4h, self.dense_4h_to_h
            states = up.fp8, down.fp8
            return fp8_mlp(hidden_states, up.weight, up.bias, down.weight, down.bias, self.act.form, states)
        dense = self.dense_4h_to_h.product if leave_bias else self.dense_4h_to_h
        return dense(self.activated(hidden_states))

    @property
    def _is_one_op_in_fp8(self) -> bool:
        dense = self.dense_h_to_4h, self.dense_4h_to_h
        return is_bare(self.act, GELU) and all(is_bare(each, Linear) and each.trains_in_fp8 for each in dense)

    def joins(self, hidden_states: Tensor, branch_bias: Tensor) -> bool:
        """Whether `joined` may take the place of the sum behind both branches, whose biases are to be added there."""
        up, down, act = self.dense_h_to_4h, self.dense_4h_to_h, self.act
        bare = all(is_bare(dense, Linear) and dense.bias is not None for dense in (up, down)) and is_bare(act, GELU)
        if not bare or up.trains_in_fp8 or down.trains_in_fp8 or not hidden_states.requires_grad:
            return False
        alike = all(each.dtype == hidden_states.dtype for each in self._weights(branch_bias))
        return alike and torch.is_grad_enabled() and goes_on(hidden_states, act.kernels)

    def joined(self, hidden_states: Tensor, stream: Tensor, branch: Tensor, branch_bias: Tensor) -> Tensor:
        """stream + branch + branch_bias + this half of hidden_states, where `joins`."""
        act, weights = self.act, self._weights(branch_bias)
        operands = hidden_states, stream, branch, weights
        return residual_mlp(*operands, act.form, makes_again=act.makes_again, backend=act.kernels)

    def _weights(self, branch_bias: Tensor) -> MlpWeights:
        up, down = self.dense_h_to_4h, self.dense_4h_to_h
        return MlpWeights(up.weight, up.bias, down.weight, down.bias, branch_bias)

    def leaving(self, hidden_states: Tensor) -> Tensor | BehindGelu:
        """What `dense_4h_to_h` is to read where `leave_by_parts` ends the block: `activated`, or how it came about."""
        dense, act = self.dense_h_to_4h, self.act
        bare = is_bare(dense, ColumnParallelLinear) and is_bare(act, GELU) and dense.bias is not None
        if not (bare and dense.postpones and self._goes_on(hidden_states)):
            return self.activated(hidden_states)
        z, y = dense.product_and_gelu(hidden_states, act.form)
        return BehindGelu(z, y, dense.bias, act.form, act.makes_again)

    def _goes_on(self, hidden_states: Tensor) -> bool:
        """Whether the first product may go on with GELU, all of one dtype."""
        dense = self.dense_h_to_4h
        alike = hidden_states.dtype == dense.weight.dtype == dense.bias.dtype
        return alike and goes_on(hidden_states, self.act.kernels)

    def activated(self, hidden_states: Tensor) -> Tensor:
        """act(dense_h_to_4h(x)), the bias added by the activation's kernel: its gradient takes no pass of its own."""
        dense, act = self.dense_h_to_4h, self.act
        bare = is_bare(dense, Linear, ColumnParallelLinear) and is_bare(act, GELU) and dense.bias is not None
        if not bare or not BIAS_GELU.has_kernel_for(act.kernels, hidden_states):
            return act(dense(hidden_states))
        if type(dense) is Linear and not dense.trains_in_fp8:
            weights, again = (dense.weight, dense.bias), act.makes_again
            return linear_gelu(hidden_states, *weights, act.form, makes_again=again, backend=act.kernels)
        product = dense.product(hidden_states)
        return bias_gelu(product, dense.bias, act.form, makes_again=act.makes_again, backend=act.kernels)


class GELU(nn.Module):
    """One form of GELU, by `kernels.bias_gelu`, of what has its bias already.

    makes_again: its result is not kept for the backward pass, which makes it again; see `recompute_selectively`.
    """

    def __init__(self, form: str, kernels: str) -> None:
        super().__init__()
        self.form = form
        self.kernels = kernels
        self.makes_again = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        return bias_gelu(hidden_states, None, self.form, makes_again=self.makes_again, backend=self.kernels)


def activation(config: GPTNeoXConfig) -> nn.Module:
    """The activation that `hidden_act` names.

    Raises:
        ValueError: transformers knows no activation of that name.
    """
    if config.hidden_act in GELU_FORMS:
        return GELU(GELU_FORMS[config.hidden_act], config.kernels)
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act={config.hidden_act!r} is unknown; choose one of {', '.join(sorted(ACT2FN))}")
    return ACT2FN[config.hidden_act]
