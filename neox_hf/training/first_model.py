"""The model that a run begins with, as far as this rank holds it: fresh weights, or released ones."""

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from neox_hf.checkpoint import load_released_weights
from neox_hf.data.encoding import ids_of
from neox_hf.errors import RecipeError
from neox_hf.modeling.causal_lm import GPTNeoXForCausalLM
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.fresh_weights import draw_weights
from neox_hf.modeling.partition import Partition, stage_bounds
from neox_hf.modeling.settings import ModelSettings, model_config
from neox_hf.modeling.stage import Stage
from neox_hf.parallel.topology import Topology
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.precision import cast_weights


def first_model(
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerFast,
    args: NeoXTrainingArguments,
    topology: Topology,
    *,
    seq_length: int,
    partition: Partition = "parameters",
) -> GPTNeoXForCausalLM:
    """The model that `settings` describes, in the precision and on the device of `args`.

    Raises:
        RecipeError: the tokenizer does not fit, or released weights cannot be read.
        TopologyError: the model cannot be split as `topology` and `partition` say.
    """
    if settings.pretrained is not None:
        config = released_config(settings)
    else:
        config = model_config(settings, tokens=ids_of(tokenizer), seq_length=seq_length)
        config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    model = empty_model(config, topology, args.numeric.weights)
    if args.deepspeed and args.deepspeed["zero_optimization"]["stage"] == 3:
        from neox_hf.training.zero import draw_partitioned  # imports DeepSpeed

        draw_partitioned(model, args.seed, args.device, args.deepspeed)
    else:
        draw_weights(model, args.seed, args.device, local_modules(model, topology, partition))
    if settings.pretrained is not None:
        load_released_weights(model, settings.pretrained, settings.revision or "main", topology)
    return model


def empty_model(config: GPTNeoXConfig, topology: Topology, dtype: torch.dtype = torch.float32) -> GPTNeoXForCausalLM:
    """The model on `meta`: names, shapes of this rank's shards, no memory."""
    with torch.device("meta"):
        return cast_weights(GPTNeoXForCausalLM(config, topology), dtype)


def local_modules(model: GPTNeoXForCausalLM, topology: Topology, partition: Partition) -> list[nn.Module]:
    """What this rank runs of the model, and so must have in memory."""
    bounds = stage_bounds(model.config, topology.pipeline, partition)
    return Stage.of_rank(model, topology, bounds).local_modules if topology.pipeline > 1 else [model]


def released_config(settings: ModelSettings) -> GPTNeoXConfig:
    """The configuration of released weights, with the fields that the recipe changes.

    Raises:
        RecipeError: there is none under that name and revision, or it cannot be read.
    """
    revision = settings.revision or "main"
    try:
        return GPTNeoXConfig.from_pretrained(settings.pretrained, revision=revision, **settings.config_fields())
    except OSError as error:
        raise RecipeError(
            f"model.pretrained={settings.pretrained!r} at {revision!r} cannot be loaded: {error}"
        ) from error
