"""transformers' own GPT-NeoX classes, computing by the modules of this package: what `apply_kernels` makes of a model.

Each is a subclass of the class that it stands for, under the same name, so that `isinstance`, lookups by name and the
`architectures` of config.json find what they look for. A module becomes one by assignment to its `__class__`: its
parameters, hooks and identity stay.
"""

from transformers.models.gpt_neox import modeling_gpt_neox as stock

from neox_hf.modeling import attention, causal_lm, layer, mlp, model, positions
from neox_hf.parallel import ALONE


class GPTNeoXRotaryEmbedding(positions.GPTNeoXRotaryEmbedding, stock.GPTNeoXRotaryEmbedding):
    """Angles fp32, one for each pair."""

    # Of transformers' configuration, which lacks names that ours has.
    compute_default_rope_parameters = staticmethod(stock.GPTNeoXRotaryEmbedding.compute_default_rope_parameters)


class GPTNeoXAttention(attention.GPTNeoXAttention, stock.GPTNeoXAttention):
    """Our attention."""

    computes_as = attention.GPTNeoXAttention
    region = ALONE


class GPTNeoXMLP(mlp.GPTNeoXMLP, stock.GPTNeoXMLP):
    """Our MLP."""

    computes_as = mlp.GPTNeoXMLP
    region = ALONE


class GPTNeoXLayer(layer.GPTNeoXLayer, stock.GPTNeoXLayer):
    """Our block."""

    region = ALONE


class GPTNeoXModel(stock.GPTNeoXModel):
    """Everything of transformers' but the forward pass, since initialization and the like read its configuration."""

    region = ALONE
    kernels = "auto"
    embed = model.GPTNeoXModel.embed
    graphs = model.GPTNeoXModel.graphs
    run_layers = model.GPTNeoXModel.run_layers
    _run_layers = model.GPTNeoXModel._run_layers
    finish = model.GPTNeoXModel.finish
    forward = model.GPTNeoXModel.forward


class GPTNeoXForCausalLM(stock.GPTNeoXForCausalLM):
    """The same, with our head and loss."""

    region = ALONE
    kernels = "auto"
    skip_logits_in_training = causal_lm.GPTNeoXForCausalLM.skip_logits_in_training
    z_loss = causal_lm.GPTNeoXForCausalLM.z_loss
    choose_kernels = causal_lm.GPTNeoXForCausalLM.choose_kernels
    summed_loss = causal_lm.GPTNeoXForCausalLM.summed_loss
    words_of_this_rank = causal_lm.GPTNeoXForCausalLM.words_of_this_rank
    loss_without_logits = causal_lm.GPTNeoXForCausalLM.loss_without_logits
    _fuses_head_and_loss = causal_lm.GPTNeoXForCausalLM._fuses_head_and_loss
    forward = causal_lm.GPTNeoXForCausalLM.forward
