"""`GPTNeoXConfig`: transformers' own configuration, and the few fields it lacks."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GPTNeoXConfig as TransformersGPTNeoXConfig

from neox_hf.kernels import BACKENDS
from neox_hf.modeling.initialization import INIT_METHODS


@strict
class GPTNeoXConfig(TransformersGPTNeoXConfig):
    """A GPT-NeoX model, such as [EleutherAI/gpt-neox-20b](https://huggingface.co/EleutherAI/gpt-neox-20b).

    Saved as model type `gpt_neox`: whoever has transformers alone can load it.

    init_method: how embeddings, the query-key-value and h-to-4h matrices and the heads start (`INIT_METHODS`).
    output_layer_init_method: how the two matrices that write into the residual stream start.
        Both are `normal` with `initializer_range` unless set, which is what transformers does.
    kernels: `auto | triton | torch`. A choice of this machine: never written to config.json.

    Every other field is transformers'. `rotary_pct` and `rotary_emb_base`, the names of GPT-NeoX, may be given in place
    of `rope_parameters`, and are always written beside it, because older readers know no other.

    Raises:
        StrictDataclassError: a field has the wrong type or an impossible value (huggingface_hub's, as for every
            configuration of transformers); also when it is saved.
    """

    # transformers' default plan names a Llama's modules.
    base_model_fsdp_plan = {  # noqa: RUF012 - the base class reads a plain dict
        "embed_in": "free_full_weight",
        "layers.*": "free_full_weight",
        "final_layer_norm": "keep_full_weight",
    }

    init_method: str = "normal"
    output_layer_init_method: str = "normal"
    kernels: str = "auto"

    def validate_initialization(self) -> None:
        """Both methods must be known. Called by `@strict`."""
        for name in ("init_method", "output_layer_init_method"):
            value = getattr(self, name)
            if value not in INIT_METHODS:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(INIT_METHODS)}")

    def validate_kernels(self) -> None:
        """The backend must be known. Called by `@strict`."""
        if self.kernels not in BACKENDS:
            raise ValueError(f"kernels={self.kernels!r} is unknown; choose one of {', '.join(BACKENDS)}")

    def validate_rotary(self) -> None:
        """A head is rotated whole, in part or not at all. Called by `@strict`."""
        if not 0.0 <= self.rotary_pct <= 1.0:
            raise ValueError(f"rotary_pct={self.rotary_pct} of each head is to be rotated; choose from 0 to 1")

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_pct(self) -> float:
        """Fraction of each head that is rotated."""
        return self.rope_parameters.get("partial_rotary_factor", 1.0)

    @rotary_pct.setter
    def rotary_pct(self, value: float) -> None:
        self.rope_parameters["partial_rotary_factor"] = value

    @property
    def rotary_emb_base(self) -> float:
        """Base of the rotary wavelengths."""
        return self.rope_parameters["rope_theta"]

    @rotary_emb_base.setter
    def rotary_emb_base(self, value: float) -> None:
        self.rope_parameters["rope_theta"] = value

    def to_dict(self) -> dict[str, Any]:
        """All fields, in both spellings of the rotary ones."""
        return super().to_dict() | {"rotary_pct": self.rotary_pct, "rotary_emb_base": self.rotary_emb_base}

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        saved = super().to_diff_dict()
        saved.pop("kernels", None)
        return saved
