"""Make transformers' Auto classes and weight loader know our classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from neox_hf.modeling.causal_lm import GPTNeoXForCausalLM
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.heads import (
    GPTNeoXForQuestionAnswering,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
)
from neox_hf.modeling.model import GPTNeoXModel

AUTO_CLASSES = {
    AutoModel: GPTNeoXModel,
    AutoModelForCausalLM: GPTNeoXForCausalLM,
    AutoModelForSequenceClassification: GPTNeoXForSequenceClassification,
    AutoModelForTokenClassification: GPTNeoXForTokenClassification,
    AutoModelForQuestionAnswering: GPTNeoXForQuestionAnswering,
}


def register() -> None:
    """After this, `AutoModel*.from_pretrained` of a `gpt_neox` repository gives our classes. Safe to call again.

    A configuration object of transformers' own class still gives transformers' own model.
    """
    AutoConfig.register(GPTNeoXConfig.model_type, GPTNeoXConfig, exist_ok=True)
    for auto_class, model_class in AUTO_CLASSES.items():
        auto_class.register(GPTNeoXConfig, model_class, exist_ok=True)
    # transformers has this very rule for its own class, and denies it to a class from outside unless it is registered:
    # without it the head of every released checkpoint, `embed_out`, would silently stay random.
    register_checkpoint_conversion_mapping(
        GPTNeoXForCausalLM.__name__,
        [WeightRenaming(source_patterns=r"^embed_out\.", target_patterns="lm_head.")],
        overwrite=True,
    )
