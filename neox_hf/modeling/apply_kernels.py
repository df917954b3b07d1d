"""`apply_kernels`: a model of transformers' GPT-NeoX classes, already built, computes with our block and kernels.

Nothing is copied. Modules change their class, in place: parameters, buffers, hooks, adapters and the configuration are
the very objects they were, and so are their names.
"""

import logging
from types import MethodType

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.gpt_neox import modeling_gpt_neox as stock
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from neox_hf.kernels import BACKENDS, OPS, Backend, describe_choice
from neox_hf.modeling import stock_classes
from neox_hf.modeling.attention import GPTNeoXAttention
from neox_hf.modeling.causal_lm import GPTNeoXForCausalLM
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.layer import GPTNeoXLayer
from neox_hf.modeling.mlp import GELU
from neox_hf.modeling.model import GPTNeoXModel, GPTNeoXPreTrainedModel
from neox_hf.modeling.norms import GPTNeoXLayerNorm
from neox_hf.parallel import Linear

logger = logging.getLogger(__name__)

BLOCK: dict[type[nn.Module], type[nn.Module]] = {
    stock.GPTNeoXLayer: stock_classes.GPTNeoXLayer,
    stock.GPTNeoXAttention: stock_classes.GPTNeoXAttention,
    stock.GPTNeoXMLP: stock_classes.GPTNeoXMLP,
    stock.GPTNeoXRotaryEmbedding: stock_classes.GPTNeoXRotaryEmbedding,
}
"""What has to change together: the angles that one module makes are what another reads."""

KNOWN = BLOCK | {stock.GPTNeoXModel: stock_classes.GPTNeoXModel}


def apply_kernels(model: nn.Module, kernels: Backend = "auto", *, skip_logits: bool = False) -> nn.Module:
    """Make the GPT-NeoX model in `model` compute with our kernels, in place; returns `model`.

    model: a GPTNeoXModel, any head of transformers on one, or what wraps them, such as a PEFT model; on any device, in
        any precision, before or after an optimizer was made. In a model of this package only the choice changes.
    kernels: `auto` (Triton on CUDA), `triton` or `torch`.
    skip_logits: while training with labels, `GPTNeoXForCausalLM` computes head and loss in one operation and returns no
        logits, which saves their memory; see its `forward`. Not for trainers that read logits.

    Linears that are quantized or replaced stay what they are. Whatever hooks or adapters are attached to is called as
    before, alone, and not fused with its neighbours. A forward hook on `query_key_value` that keeps the output sees
    query and key change: they are rotated where they lie.

    Raises:
        ValueError: no GPT-NeoX model is in there, a part of it is of a class or a forward pass of the user's own, or
            `kernels` is unknown. Nothing has changed then.
    """
    if kernels not in BACKENDS:
        raise ValueError(f"kernels={kernels!r} is unknown; choose one of {', '.join(BACKENDS)}")
    _refuse_what_is_not_stock(model)
    # All of them before anything changes: what a configuration has wrong is found here.
    examples = {base: _example_for(base) for base in model.modules() if type(base) is stock.GPTNeoXModel}
    for module in list(model.modules()):
        if type(module) is stock.GPTNeoXForCausalLM:
            _become(module, stock_classes.GPTNeoXForCausalLM)
        elif type(module) is stock.GPTNeoXModel:
            _run_our_block(module, examples[module])
    for module in model.modules():
        _choose(module, kernels, skip_logits)
    logger.info(describe_choice(OPS, kernels))
    return model


def _refuse_what_is_not_stock(model: nn.Module) -> None:
    modules = list(model.modules())
    if not any(isinstance(module, stock.GPTNeoXModel | GPTNeoXModel) for module in modules):
        raise ValueError(
            f"apply_kernels wants a GPT-NeoX model; found {_name(type(model))}, which holds no GPTNeoXModel. "
            "Load one with transformers' AutoModelForCausalLM, from a checkpoint of model_type gpt_neox"
        )
    for module in modules:
        for kind in KNOWN:
            if isinstance(module, kind):
                _refuse_unless_one_of(module, kind)
        if isinstance(module, stock.GPTNeoXModel):
            _refuse_unless_holds(module, "rotary_emb", stock.GPTNeoXRotaryEmbedding)
        if isinstance(module, stock.GPTNeoXLayer):
            _refuse_unless_holds(module, "attention", stock.GPTNeoXAttention)


def _refuse_unless_one_of(module: nn.Module, kind: type[nn.Module]) -> None:
    """A subclass, or a forward pass put on the instance, may rely on anything; accelerate's hooks call the class's."""
    patched = kind in BLOCK and "forward" in vars(module) and "_old_forward" not in vars(module)
    if type(module) not in (kind, KNOWN[kind]) or patched:
        found = f"a {kind.__name__} whose `forward` was replaced" if patched else _name(type(module))
        raise ValueError(
            f"apply_kernels knows transformers' own {kind.__name__}; found {found}. "
            "Apply the kernels first, and what changes the class or the forward pass after them"
        )


def _refuse_unless_holds(parent: nn.Module, name: str, kind: type[nn.Module]) -> None:
    child = getattr(parent, name)
    if not isinstance(child, kind):
        raise ValueError(
            f"apply_kernels knows transformers' own {kind.__name__} as `{name}` of a {type(parent).__name__}; "
            f"found {_name(type(child))}. Apply the kernels to the model as transformers builds it"
        )


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}"


def _example_for(base: stock.GPTNeoXModel) -> GPTNeoXLayer:
    """A block of ours that computes what those of `base` do. Their class knows of no field that only ours has, even if
    its configuration carries one."""
    known = stock.GPTNeoXConfig().to_dict()
    config = {name: value for name, value in base.config.to_dict().items() if name in known}
    with torch.device("meta"):
        return GPTNeoXLayer(GPTNeoXConfig.from_dict(config), layer_idx=0)


def _run_our_block(base: stock.GPTNeoXModel, example: GPTNeoXLayer) -> None:
    """Have the model and all its blocks compute with ours."""
    _become(base, stock_classes.GPTNeoXModel)
    _change_norms(example, base.final_layer_norm)
    for module in list(base.modules()):
        if type(module) is stock.GPTNeoXRotaryEmbedding:
            _become(module, stock_classes.GPTNeoXRotaryEmbedding)
        elif type(module) is stock.GPTNeoXLayer:
            _become(module, stock_classes.GPTNeoXLayer, example)
            _change_norms(example, module.input_layernorm, module.post_attention_layernorm)
        elif type(module) is stock.GPTNeoXAttention:
            _become(module, stock_classes.GPTNeoXAttention, example.attention)
            _change_linears(example, module.query_key_value, module.dense)
        elif type(module) is stock.GPTNeoXMLP:
            _become(module, stock_classes.GPTNeoXMLP, example.mlp)
            _change_linears(example, module.dense_h_to_4h, module.dense_4h_to_h)
            if isinstance(example.mlp.act, GELU) and type(module.act) is type(ACT2FN[base.config.hidden_act]):
                _become(module.act, GELU, example.mlp.act)


def _become(module: nn.Module, kind: type[nn.Module], example: nn.Module | None = None) -> None:
    """Give a module another class, and those attributes that one of ours has from its constructor and it lacks."""
    module.__class__ = kind
    for name, value in vars(example).items() if example is not None else ():
        vars(module).setdefault(name, value)
    if "_old_forward" in vars(module):  # accelerate's hooks call this one, bound to the class as it was
        module._old_forward = MethodType(kind.forward, module)
    if isinstance(module, PreTrainedModel):
        # transformers does this where it constructs a model; without it nothing records hidden states.
        _CAN_RECORD_REGISTRY[module] = module._can_record_outputs


def _change_norms(example: GPTNeoXLayer, *norms: nn.Module) -> None:
    """Also those that an adapter holds, to train a copy."""
    for norm in norms:
        for part in norm.modules():
            if type(part) is nn.LayerNorm and part.weight is not None:
                _become(part, GPTNeoXLayerNorm, example.input_layernorm)


def _change_linears(example: GPTNeoXLayer, *linears: nn.Module) -> None:
    """Also the one that an adapter stands around."""
    for linear in linears:
        base = linear
        while hasattr(base, "base_layer"):
            base = base.base_layer
        if type(base) is nn.Linear:
            _become(base, Linear, example.attention.query_key_value)


def _choose(module: nn.Module, kernels: Backend, skip_logits: bool) -> None:
    computing = GPTNeoXLayer | GPTNeoXAttention | GPTNeoXLayerNorm | GELU | Linear
    if isinstance(module, computing | GPTNeoXModel | stock_classes.GPTNeoXModel):
        module.kernels = kernels
    elif isinstance(module, GPTNeoXForCausalLM | stock_classes.GPTNeoXForCausalLM):
        module.choose_kernels(kernels)
        module.skip_logits_in_training = skip_logits
    if isinstance(module, GPTNeoXPreTrainedModel):
        module.config.kernels = kernels
