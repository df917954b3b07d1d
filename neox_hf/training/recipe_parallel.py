"""What `parallel:` must satisfy, in itself and with the model, the samples and the training that it is to run."""

from collections.abc import Iterator
from typing import Any

import torch

from neox_hf.config import Problem
from neox_hf.data.settings import DataSettings
from neox_hf.errors import TopologyError
from neox_hf.modeling.partition import check_bounds
from neox_hf.modeling.presets import PRESETS
from neox_hf.modeling.settings import ModelSettings
from neox_hf.parallel.settings import ParallelSettings
from neox_hf.training.precision import precision_here, precision_of
from neox_hf.training.recipe_values import DDP_KEYS, changed

SHARDABLE = ("adamw_torch_fused", "adamw_torch")
"""Values of `train.optim` whose state DeepSpeed shards and a checkpoint takes apart: each element is updated by itself,
and the state begins with the first step."""


def parallel_problems(
    parallel: ParallelSettings, model: ModelSettings, data: DataSettings, train: Any
) -> Iterator[Problem]:
    yield from _size_problems(parallel, model)
    yield from _sequence_problems(parallel, data)
    yield from _zero_problems(parallel, train)
    yield from _precision_problems(parallel, train)
    if parallel.needs_deepspeed:
        yield from _deepspeed_problems(train)
    if parallel.splits_model:
        yield from _split_problems(train)


def _size_problems(parallel: ParallelSettings, model: ModelSettings) -> Iterator[Problem]:
    named = PRESETS.get(model.name or "", {})

    def size(key: str) -> int | None:
        return getattr(model, key) or named.get(key)

    heads, inner, layers = size("num_attention_heads"), size("intermediate_size"), size("num_hidden_layers")
    if inner is None and size("hidden_size") is not None:
        inner = 4 * size("hidden_size")
    tensor, stages = parallel.tensor, parallel.pipeline
    if tensor > 1:
        for key, whole in (("num_attention_heads", heads), ("intermediate_size", inner)):
            if whole is not None and whole % tensor:
                message = (
                    f"does not divide model.{key} = {whole}, which its ranks share; choose one of {_divisors(whole)}"
                )
                yield Problem(("parallel", "tensor"), tensor, message)
    if layers is not None and stages > layers:
        message = f"is more than model.num_hidden_layers = {layers}; every stage holds one layer at least"
        yield Problem(("parallel", "pipeline"), stages, message)
    elif stages > 1 and layers is not None and isinstance(parallel.partition, list):
        try:
            check_bounds(parallel.partition, layers, stages)
        except TopologyError as error:
            yield Problem(("parallel", "partition"), parallel.partition, str(error))
    if stages == 1 and parallel.partition != "parameters":
        yield Problem(("parallel", "partition"), parallel.partition, "does nothing while parallel.pipeline = 1")


def _divisors(number: int, largest: int = 64) -> str:
    return ", ".join(str(n) for n in range(1, min(number, largest) + 1) if number % n == 0)


def _sequence_problems(parallel: ParallelSettings, data: DataSettings) -> Iterator[Problem]:
    if not parallel.sequence:
        return
    if parallel.tensor == 1:
        message = "shards the sequence inside a tensor group; set parallel.tensor above 1 or leave it out"
        yield Problem(("parallel", "sequence"), True, message)
    elif data.seq_length % parallel.tensor:
        message = f"is no multiple of parallel.tensor = {parallel.tensor}, among which parallel.sequence shares it out"
        yield Problem(("data", "seq_length"), data.seq_length, message)


def _zero_problems(parallel: ParallelSettings, train: Any) -> Iterator[Problem]:
    if parallel.splits_model and parallel.zero_stage in (2, 3):
        what = {2: "gradients", 3: "weights"}[parallel.zero_stage]
        message = (
            f"shards {what} over the data-parallel ranks after each backward pass; DeepSpeed's pipeline engine, which "
            f"runs parallel.tensor = {parallel.tensor} x parallel.pipeline = {parallel.pipeline}, keeps them until all "
            "micro-batches of a step are through; use 1"
        )
        yield Problem(("parallel", "zero_stage"), parallel.zero_stage, message)
    if parallel.zero_stage == 3 and train.activation_checkpointing == "selective":
        message = (
            "cannot tell a block's operations from the gathering of its weights at parallel.zero_stage = 3; use full"
        )
        yield Problem(("train", "activation_checkpointing"), "selective", message)
    if parallel.offload != "none" and not parallel.needs_deepspeed:
        message = "moves the optimizer's state that ZeRO shards; set parallel.zero_stage to 1, 2 or 3"
        yield Problem(("parallel", "offload"), parallel.offload, message)


def _precision_problems(parallel: ParallelSettings, train: Any) -> Iterator[Problem]:
    where = ("train", "precision")
    if parallel.needs_deepspeed and precision_of(precision_here(train.precision)).autocast:
        message = (
            "keeps fp32 weights and casts for each product; DeepSpeed, which runs ZeRO, tensor and pipeline "
            "parallelism, has one dtype for all; use bf16, whose fp32 master weights it shards, or fp32"
        )
        yield Problem(where, train.precision, message)
    if parallel.needs_deepspeed and train.precision == "pure_bf16":
        message = (
            "keeps no fp32 master weights; DeepSpeed, which runs ZeRO, tensor and pipeline parallelism, always does; "
            "use bf16, whose masters it shards"
        )
        yield Problem(where, train.precision, message)
    if parallel.needs_deepspeed and train.precision == "fp8":
        message = (
            "scales whole linears between one step of our own optimizer and the next; DeepSpeed runs ZeRO, tensor and "
            "pipeline parallelism; use bf16, or leave parallel.zero_stage at 0 and the sizes at 1"
        )
        yield Problem(where, train.precision, message)
    if train.precision != "fp16":
        return
    if not parallel.needs_deepspeed:
        message = "needs the loss scale of DeepSpeed; set parallel.zero_stage to 1, 2 or 3, or use bf16"
        yield Problem(where, train.precision, message)
    if not torch.cuda.is_available():
        yield Problem(where, train.precision, "needs a CUDA device; use fp32 or bf16")


def _deepspeed_problems(train: Any) -> Iterator[Problem]:
    optimizer = getattr(train.optim, "value", train.optim)
    if optimizer not in SHARDABLE:
        message = f"keeps a state that cannot be sharded element by element; use {' or '.join(SHARDABLE)}"
        yield Problem(("train", "optim"), optimizer, message)
    for key in DDP_KEYS:
        if changed(train, key):
            message = "does nothing: DeepSpeed, not DistributedDataParallel, reduces the gradients; remove it"
            yield Problem(("train", key), getattr(train, key), message)


def _split_problems(train: Any) -> Iterator[Problem]:
    if train.debug:
        message = "watches the forward pass of a whole model, which no rank runs when the model is split; remove it"
        yield Problem(("train", "debug"), train.debug, message)
    if not train.average_tokens_across_devices:
        message = (
            "cannot be switched off with tensor or pipeline parallelism, which averages over all labels; remove it"
        )
        yield Problem(("train", "average_tokens_across_devices"), False, message)
