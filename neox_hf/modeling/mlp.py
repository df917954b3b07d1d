"""The feed-forward half of the block."""

from torch import Tensor, nn
from transformers.activations import ACT2FN

from neox_hf.kernels import bias_gelu
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.initialization import output_layer
from neox_hf.parallel import ALONE, TensorRegion, column_linear, row_linear

# transformers' names of the two forms of GELU. `gelu_fast` is GPT-NeoX-20B's.
GELU_FORMS = {"gelu": "erf", "gelu_fast": "tanh", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


class GPTNeoXMLP(nn.Module):
    """dense_4h_to_h(activation(dense_h_to_4h(x))), H -> F -> H. Each rank of the region computes some of the F."""

    def __init__(self, config: GPTNeoXConfig, region: TensorRegion = ALONE) -> None:
        super().__init__()
        region.share(config.intermediate_size, "intermediate_size")
        self.dense_h_to_4h = column_linear(config.hidden_size, config.intermediate_size, region)
        self.dense_4h_to_h = output_layer(row_linear(config.intermediate_size, config.hidden_size, region))
        self.act = activation(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(hidden_states)))


class GELU(nn.Module):
    """One form of GELU, by `kernels.bias_gelu`. The linear before it adds its own bias: in torch that costs nothing."""

    def __init__(self, form: str, kernels: str) -> None:
        super().__init__()
        self.form = form
        self.kernels = kernels

    def forward(self, hidden_states: Tensor) -> Tensor:
        return bias_gelu(hidden_states, None, self.form, backend=self.kernels)


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
