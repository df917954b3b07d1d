"""The GPT-NeoX model: one block, and the Hugging Face classes around it."""

from neox_hf.modeling.accounting import flops_per_token, parameter_count
from neox_hf.modeling.causal_lm import GPTNeoXForCausalLM
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.heads import (
    GPTNeoXForQuestionAnswering,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
)
from neox_hf.modeling.layer import GPTNeoXLayer
from neox_hf.modeling.model import GPTNeoXModel, GPTNeoXPreTrainedModel
from neox_hf.modeling.presets import PRESETS, preset_config
from neox_hf.modeling.registration import register

__all__ = [
    "PRESETS",
    "GPTNeoXConfig",
    "GPTNeoXForCausalLM",
    "GPTNeoXForQuestionAnswering",
    "GPTNeoXForSequenceClassification",
    "GPTNeoXForTokenClassification",
    "GPTNeoXLayer",
    "GPTNeoXModel",
    "GPTNeoXPreTrainedModel",
    "flops_per_token",
    "parameter_count",
    "preset_config",
    "register",
]
