"""Released sizes by name, as configuration fields for pretraining.

Sources: gpt-neox configs/pythia/*.yml and configs/20B.yml; vocabulary sizes are the released ones, padded for the
tensor parallelism each size was trained with.
"""

from typing import Any

from neox_hf.config import nearest
from neox_hf.errors import RecipeError
from neox_hf.modeling.configuration import GPTNeoXConfig

NEOX_INIT = {"init_method": "small_init", "output_layer_init_method": "wang_init"}
# Erratum of Pythia: the 6.9B and 12B configurations named no method, so these two got GPT-NeoX's defaults.
DEFAULT_INIT = {"init_method": "normal", "output_layer_init_method": "scaled_normal"}


def shape(layers: int, hidden: int, heads: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    """Fields that every released size shares, and its own."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000.0,
        "hidden_act": "gelu",
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **NEOX_INIT,
        **more,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "pythia-14m": shape(6, 128, 4, 50304),
    "pythia-31m": shape(6, 256, 8, 50304),
    "pythia-70m": shape(6, 512, 8, 50304),
    "pythia-160m": shape(12, 768, 12, 50304),
    "pythia-410m": shape(24, 1024, 16, 50304),
    "pythia-1b": shape(16, 2048, 8, 50304),
    "pythia-1.4b": shape(24, 2048, 16, 50304),
    "pythia-2.8b": shape(32, 2560, 32, 50304),
    "pythia-6.9b": shape(32, 4096, 32, 50432, **DEFAULT_INIT),
    "pythia-12b": shape(36, 5120, 40, 50688, **DEFAULT_INIT),
    "gpt-neox-20b": shape(44, 6144, 64, 50432, hidden_act="gelu_fast"),
}


def preset_config(name: str, **overrides: Any) -> GPTNeoXConfig:
    """The configuration of a released size, with any field replaced.

    Raises:
        RecipeError: no size has that name.
    """
    if name not in PRESETS:
        close = nearest(name.lower(), PRESETS)
        hint = f"Did you mean {close!r}? " if close else ""
        raise RecipeError(f"model {name!r} is unknown. {hint}Choose one of {', '.join(PRESETS)}")
    return GPTNeoXConfig(**(PRESETS[name] | overrides))
