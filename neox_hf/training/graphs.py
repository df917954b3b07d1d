"""Whether a run's layers are captured as CUDA graphs (`train.cuda_graphs`), and having them so."""

import logging
from collections.abc import Sequence

from torch import nn

from neox_hf.modeling.causal_lm import GPTNeoXForCausalLM
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.layer_graphs import LayerGraphs
from neox_hf.parallel.topology import Topology
from neox_hf.training.arguments import NeoXTrainingArguments

logger = logging.getLogger(__name__)


def graph_layers(
    model: nn.Module, layers: Sequence[nn.Module] | None, args: NeoXTrainingArguments, topology: Topology
) -> None:
    """Have the base model run `layers` (None: all of its own) as graphs, if the run is to and can.

    Raises:
        ValueError: `cuda_graphs` is on, and this run cannot.
    """
    reason = reason_against_graphs(model, args)
    if args.cuda_graphs is True and reason:
        raise ValueError(f"train.cuda_graphs = true, but {reason}; set it to auto or false")
    wanted = args.cuda_graphs is True or (args.cuda_graphs == "auto" and waits_for_host(topology))
    if reason or not wanted:
        return
    model.gpt_neox.graphs = LayerGraphs(model.gpt_neox.layers if layers is None else layers)
    logger.info("layers run as CUDA graphs: train.cuda_graphs = %s", args.cuda_graphs)


def waits_for_host(topology: Topology) -> bool:
    """Whether the device would be done with a layer before Python has asked for all of it."""
    return topology.tensor > 1


def reason_against_graphs(model: nn.Module, args: NeoXTrainingArguments) -> str | None:
    """Why the layers of this run cannot be captured; None if they can."""
    if args.device.type != "cuda":
        return f"there is no CUDA device, but {args.device.type}"
    if not isinstance(model, GPTNeoXForCausalLM):
        return f"the model is a {type(model).__name__}, and only a neox_hf.GPTNeoXForCausalLM knows of graphs"
    if args.torch_compile:
        return "train.torch_compile compiles the layers, which has graphs of its own"
    if args.numeric.autocast or not (args.numeric.master or args.precision == "pure_bf16"):
        return f"train.precision = {args.precision} leaves summing gradients to autograd; use bf16 or pure_bf16"
    if args.recompute == "full":
        return "train.activation_checkpointing = full runs each block a second time; use selective or none"
    return _reason_in(model.config)


def _reason_in(config: GPTNeoXConfig) -> str | None:
    if config.hidden_dropout or config.attention_dropout:
        return "the model has dropout, and a graph would drop the same elements each time"
    if config._attn_implementation != "sdpa":
        return f"attention runs as {config._attn_implementation}, and only sdpa's was tried in graphs"
    return None
