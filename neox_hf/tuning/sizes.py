"""The shapes and dtypes that one rank of a recipe launches kernels with."""

from dataclasses import dataclass

import torch

from neox_hf.errors import RecipeError
from neox_hf.kernels import takes_documents
from neox_hf.modeling.accounting import rank_parameters
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.mlp import GELU_FORMS
from neox_hf.training.dry_run import known_config
from neox_hf.training.first_model import released_config
from neox_hf.training.optimizers import FUSED
from neox_hf.training.precision import Precision, precision_here, precision_of
from neox_hf.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """One rank's share of a layer, of the head and of the optimizer.

    batch: samples of a micro-batch, of `sequence` tokens. inner: of the MLP. heads: of `head_size`, the first `rotary`
    of which are rotated. vocabulary: columns of the logits; None where they are split over ranks.
    form: of GELU; None for another activation. dropout: behind attention and MLP. attention_bias, parallel_residual:
    as in the configuration. documents: whether a kernel keeps packed documents apart.
    stream: dtype of the residual stream and of the weights; product: of what matrix products give.
    gradient: of the weights' gradients. master: whether fp32 masters are stepped. parameters: most that a rank holds
    and our kernels step; 0 where DeepSpeed steps otherwise (`training.deepspeed_step`).
    """

    batch: int
    sequence: int
    hidden: int
    inner: int
    heads: int
    head_size: int
    rotary: int
    vocabulary: int | None
    form: str | None
    dropout: float
    attention_bias: bool
    parallel_residual: bool
    documents: bool
    stream: torch.dtype
    product: torch.dtype
    gradient: torch.dtype
    master: bool
    parameters: int

    @classmethod
    def of(cls, recipe: Recipe) -> "Sizes":
        """Those of `recipe` on this host's device.

        Raises:
            RecipeError: the recipe does not say how large its model is, or released weights cannot be read.
        """
        config, parallel = _config(recipe), recipe.parallel
        precision = precision_of(precision_here(recipe.train.precision))
        return cls(
            batch=recipe.train.per_device_train_batch_size,
            sequence=recipe.data.seq_length,
            hidden=config.hidden_size,
            inner=config.intermediate_size // parallel.tensor,
            heads=config.num_attention_heads // parallel.tensor,
            head_size=config.head_size,
            rotary=int(config.head_size * config.rotary_pct),
            vocabulary=config.vocab_size if parallel.tensor == 1 else None,
            form=GELU_FORMS.get(config.hidden_act),
            dropout=config.hidden_dropout,
            attention_bias=config.attention_bias,
            parallel_residual=config.use_parallel_residual,
            documents=_keeps_documents_apart(recipe, config),
            stream=precision.weights,
            product=torch.bfloat16 if precision.autocast else precision.weights,
            gradient=torch.float32 if precision.master else precision.weights,
            master=precision.master,
            parameters=_stepped(recipe, config, precision),
        )

    @property
    def mlp_is_one_node(self) -> bool:
        """Whether the feed-forward half closes a block that is not split (`kernels/residual_mlp.py`)."""
        behind_it_a_sum = self.parallel_residual and self.attention_bias and not self.dropout
        alone = self.vocabulary is not None
        return alone and behind_it_a_sum and self.form is not None and self.stream == self.product

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence


def _stepped(recipe: Recipe, config: GPTNeoXConfig, precision: Precision) -> int:
    parallel = recipe.parallel
    at_once = precision.master and not precision.scaled and parallel.effective_zero_stage == 1
    by_kernel = recipe.train.optim == FUSED and config.kernels != "torch"
    if parallel.needs_deepspeed and (not at_once or not by_kernel or parallel.offload != "none"):
        return 0
    split = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "partition": parallel.partition}
    return max(ranks[0] for ranks in rank_parameters(config, **split))


def _keeps_documents_apart(recipe: Recipe, config: GPTNeoXConfig) -> bool:
    if not recipe.data.document_mask or config.attention_dropout or config.kernels == "torch":
        return False
    here = torch.empty(0, device="cuda" if torch.cuda.is_available() else "meta")
    return recipe.model.attn_implementation in (None, "sdpa") and takes_documents("triton", here, config.head_size)


def _config(recipe: Recipe) -> GPTNeoXConfig:
    config = released_config(recipe.model) if recipe.model.pretrained is not None else known_config(recipe)
    if config is None:
        raise RecipeError(
            f"the recipe does not say how many words the {recipe.tokenizer.kind} tokenizer has, and so not the shapes "
            "to tune for; set model.vocab_size, or model.name to a released size"
        )
    return config
