"""Whether a run's layers are captured as CUDA graphs (`train.cuda_graphs`), and having them so."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neox_hf.config import Problem
from neox_hf.modeling.accounting import layer_flops_per_token
from neox_hf.modeling.causal_lm import GPTNeoXForCausalLM
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.layer_graphs import LayerGraphs
from neox_hf.modeling.settings import ModelSettings
from neox_hf.parallel.settings import ParallelSettings
from neox_hf.parallel.topology import Topology
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.precision import precision_here

logger = logging.getLogger(__name__)

PRECISIONS = ("bf16", "pure_bf16", "fp8")
"""Those in which every gradient has a place where it is summed. In the others autograd sums."""

HOST_BOUND_FLOPS = 1.2e12
"""Of one layer, forward and backward: some 2.5 ms of an H200, while Python takes 2 to 4 to ask for its kernels. Below
it graphs made training 1.7 times (410M, 8,192 tokens) to 4.3 times (160M, 4,096 tokens) as fast."""


def graph_layers(
    model: nn.Module,
    args: NeoXTrainingArguments,
    topology: Topology,
    *,
    layers: Sequence[nn.Module] | None = None,
    ready: Callable[[], bool] | None = None,
    reason: str | None = None,
    unasked: bool = True,
) -> None:
    """Have the base model run `layers` (None: all of its own) as graphs, if the run is to and can.

    ready: whether a graph may hold the coming pass; None is always. reason: what the engine knows to be against it.
    unasked: whether `auto` may have graphs.

    Raises:
        ValueError: `cuda_graphs` is on, and this run cannot.
    """
    reason = _reason_in_run(model, args) or reason
    if args.cuda_graphs is True and reason:
        raise ValueError(f"train.cuda_graphs = true, but {reason}; set it to auto or false")
    if reason or args.cuda_graphs is False or (args.cuda_graphs == "auto" and not unasked):
        return
    all_passes = args.cuda_graphs is True or topology.tensor > 1

    def takes(hidden: Tensor) -> bool:
        return (ready is None or ready()) and (all_passes or waits_for_host(model.config, hidden))

    model.gpt_neox.graphs = LayerGraphs(model.gpt_neox.layers if layers is None else layers, takes)
    which = "layers" if all_passes else "layers of small micro-batches"
    logger.info("%s run as CUDA graphs: train.cuda_graphs = %s", which, args.cuda_graphs)


def waits_for_host(config: GPTNeoXConfig, hidden: Tensor) -> bool:
    """Whether a device would be done with a layer's passes over hidden [B, S, H] before Python has asked for them."""
    batch, sequence, _ = hidden.shape
    return batch * sequence * layer_flops_per_token(config, sequence) < HOST_BOUND_FLOPS


def graph_problems(train: Any, model: ModelSettings, parallel: ParallelSettings) -> Iterator[Problem]:
    """What in a recipe speaks against `cuda_graphs: true`."""
    if train.cuda_graphs is not True:
        return
    reason = _reason_in_settings(train, model) or _reason_in_attention(model.attn_implementation or "sdpa")
    if not torch.cuda.is_available():
        reason = "there is no CUDA device"
    elif parallel.zero_stage and not parallel.splits_model:
        reason = f"parallel.zero_stage = {parallel.zero_stage} moves gradients while the layers run"
    elif parallel.offload != "none":
        reason = f"parallel.offload = {parallel.offload} has gradients summed elsewhere"
    if reason:
        yield Problem(("train", "cuda_graphs"), True, f"cannot be: {reason}")


def _reason_in_run(model: nn.Module, args: NeoXTrainingArguments) -> str | None:
    if args.device.type != "cuda":
        return f"there is no CUDA device, but {args.device.type}"
    if not isinstance(model, GPTNeoXForCausalLM):
        return f"the model is a {type(model).__name__}, and only a neox_hf.GPTNeoXForCausalLM knows of graphs"
    return _reason_in_settings(args, model.config) or _reason_in_attention(model.config._attn_implementation)


def _reason_in_settings(train: Any, model: Any) -> str | None:
    """train, model: sections of a recipe, or arguments and configuration."""
    if precision_here(train.precision) not in PRECISIONS:
        return f"train.precision = {train.precision} leaves gradients to autograd; use {' or '.join(PRECISIONS)}"
    if train.torch_compile:
        return "train.torch_compile compiles the layers, and has graphs of its own"
    if train.activation_checkpointing in (True, "full"):
        return "train.activation_checkpointing = full runs each block a second time; use selective or none"
    if model.hidden_dropout or model.attention_dropout:
        return "the model has dropout, and a graph would drop the same elements each time"
    return None


def _reason_in_attention(implementation: str) -> str | None:
    return None if implementation == "sdpa" else f"attention runs as {implementation}, and only sdpa can be captured"
