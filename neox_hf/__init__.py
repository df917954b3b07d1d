"""GPT-NeoX inside the Hugging Face ecosystem.

Importing this package registers its classes with transformers' Auto classes. The trainer is imported when first asked
for, so a script that only loads a model pays for nothing else.
"""

from importlib import import_module
from typing import Any

from neox_hf.modeling import (
    PRESETS,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForQuestionAnswering,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
    GPTNeoXLayer,
    GPTNeoXModel,
    GPTNeoXPreTrainedModel,
    preset_config,
    register,
)
from neox_hf.version import VERSION as __version__

LAZY = {
    "apply_kernels": "neox_hf.modeling.apply_kernels",
    "NeoXTrainer": "neox_hf.training.trainer",
    "NeoXTrainingArguments": "neox_hf.training.arguments",
    "load_recipe": "neox_hf.training.recipe",
}

register()


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module 'neox_hf' has no attribute {name!r}")
    return getattr(import_module(LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


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
    "NeoXTrainer",
    "NeoXTrainingArguments",
    "__version__",
    "apply_kernels",
    "load_recipe",
    "preset_config",
]
