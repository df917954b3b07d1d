"""The `model:` section of a recipe, and the configuration it describes."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from neox_hf.errors import RecipeError
from neox_hf.kernels.dispatch import Backend
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.presets import preset_config

VOCAB_MULTIPLE = 128
"""A vocabulary decided by the tokenizer is rounded up to this, which keeps the head's matrix product fast."""

OF_THE_RECIPE = ("name", "pretrained", "revision")
"""Keys of the section that say where a configuration comes from and are no fields of it."""

NEED_NO_NEW_WEIGHTS = ("hidden_dropout", "attention_dropout", "attn_implementation", "kernels")
"""Fields that may be changed on released weights: none of them alters a shape or what the weights compute."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """A size by name, or released weights, or fields of the configuration; fields change a named size.

    name: a known size (`pythia-160m`, `gpt-neox-20b`), trained from fresh weights.
    pretrained: a folder or a Hub id whose weights the run starts from. revision: of that repository.
    vocab_size: rows of the embedding; unset and with no name, the tokenizer's size rounded up to a multiple of 128.
    num_hidden_layers, hidden_size, num_attention_heads: needed when there is neither name nor pretrained.
    intermediate_size: width of the MLP; 4 x hidden_size when unset.
    max_position_embeddings: longest sequence in tokens; data.seq_length when unset and with no name.
    rotary_pct: share of each head that is rotated. rotary_emb_base: base of the rotation's wavelengths.
    use_parallel_residual: attention and MLP read the same residual stream. attention_bias: biases in attention.
    hidden_act: activation of the MLP (`gelu`, `gelu_fast`, ...). layer_norm_eps: of every layer norm.
    tie_word_embeddings: one matrix is both embedding and head.
    hidden_dropout, attention_dropout: probabilities.
    init_method: GPT-NeoX initialisation of embeddings, QKV and the MLP's first matrix; output_layer_init_method:
        of the two matrices that write to the residual stream. initializer_range: standard deviation of `normal`.
    attn_implementation: attention backend of transformers (`eager`, `sdpa`, `flash_attention_2`, ...).
    kernels: who computes norms, rotary, activation and loss: `auto` (Triton on CUDA), `triton` or `torch`.

    Whatever is unset is left to the named size, or else to the configuration's own default.
    """

    name: str | None = None
    pretrained: str | None = None
    revision: str | None = None
    vocab_size: int | None = None
    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int | None = None
    rotary_pct: float | None = None
    rotary_emb_base: float | None = None
    use_parallel_residual: bool | None = None
    attention_bias: bool | None = None
    hidden_act: str | None = None
    layer_norm_eps: float | None = None
    tie_word_embeddings: bool | None = None
    hidden_dropout: float | None = None
    attention_dropout: float | None = None
    init_method: str | None = None
    output_layer_init_method: str | None = None
    initializer_range: float | None = None
    attn_implementation: str | None = None
    kernels: Backend | None = None

    def config_fields(self) -> dict[str, Any]:
        """The fields of the configuration that this section sets."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: value for key, value in values.items() if value is not None and key not in OF_THE_RECIPE}


def padded_vocab_size(tokens: int) -> int:
    """`tokens` rounded up to a multiple of VOCAB_MULTIPLE."""
    return -(-tokens // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def model_config(settings: ModelSettings, *, tokens: int, seq_length: int) -> GPTNeoXConfig:
    """The configuration of a model trained from fresh weights.

    tokens: size of the tokenizer. seq_length: tokens in a sample.

    Raises:
        RecipeError: the tokenizer is larger than the vocabulary that the section names.
    """
    assert settings.pretrained is None, "released weights bring their own configuration"
    fields = settings.config_fields()
    if settings.name is None:
        fields.setdefault("vocab_size", padded_vocab_size(tokens))
        fields.setdefault("max_position_embeddings", seq_length)
        fields.setdefault("intermediate_size", 4 * fields["hidden_size"])
        config = GPTNeoXConfig(**fields)
    else:
        config = preset_config(settings.name, **fields)
    if tokens > config.vocab_size:
        raise RecipeError(
            f"model.vocab_size = {config.vocab_size}: the tokenizer has {tokens} tokens; "
            f"set model.vocab_size to at least {padded_vocab_size(tokens)} or use a smaller tokenizer"
        )
    return config
