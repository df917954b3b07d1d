"""What the values of a recipe must satisfy together. Each check yields the problems that it finds."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import get_scheduler
from transformers.activations import ACT2FN
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.training_args import trainer_log_levels

from neox_hf.checkpoint.settings import HubSettings
from neox_hf.config import Problem
from neox_hf.data.settings import DataSettings, SourceSettings, TokenizerSettings
from neox_hf.kernels.fp8_format import MULTIPLE
from neox_hf.kernels.fp8_product import reason_against_device
from neox_hf.kernels.language import runs_on
from neox_hf.modeling.initialization import INIT_METHODS
from neox_hf.modeling.presets import PRESETS
from neox_hf.modeling.settings import NEED_NO_NEW_WEIGHTS, ModelSettings
from neox_hf.training.optimizer_arguments import arguments_problem
from neox_hf.training.optimizers import WITH_MASTER_WEIGHTS
from neox_hf.training.precision import precision_here, precision_of
from neox_hf.training.recipe_packages import missing_for_attention, missing_for_optimizer
from neox_hf.training.recipe_values import DDP_KEYS, changed, did_you_mean
from neox_hf.training.train_section import METRICS

BYTE_TOKENS = 257
"""256 bytes and the end-of-document token."""


@dataclass(frozen=True)
class TokenizerKind:
    """Keys that a kind of tokenizer needs, each with what to write; keys it may have; its smallest vocabulary."""

    needs: dict[str, str] = field(default_factory=dict)
    takes: tuple[str, ...] = ()
    fewest_tokens: int = 0


TOKENIZER_KINDS = {
    "pretrained": TokenizerKind({"path": "a folder, a tokenizer.json or a Hub id"}, takes=("revision",)),
    "trained": TokenizerKind({"vocab_size": "the number of tokens to learn"}, fewest_tokens=BYTE_TOKENS),
    "byte": TokenizerKind(),
    "char": TokenizerKind(takes=("vocab_size",), fewest_tokens=BYTE_TOKENS + 1),
}

NEOX_SCHEDULE_KEYS = ("lr_warmup_fraction", "lr_decay_steps", "min_lr")
HF_SCHEDULE_KEYS = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")


def model_problems(model: ModelSettings, data: DataSettings, tokenizer: TokenizerSettings) -> Iterator[Problem]:
    yield from _model_origin_problems(model)
    yield from _model_backend_problems(model)
    if model.pretrained is not None or (model.name is not None and model.name not in PRESETS):
        return
    named = PRESETS[model.name] if model.name else {}

    def effective(key: str, default: Any = None) -> Any:
        value = getattr(model, key)
        return value if value is not None else named.get(key, default)

    yield from _shape_problems(
        effective("hidden_size"), effective("num_attention_heads"), effective("rotary_pct", 0.25)
    )
    positions = effective("max_position_embeddings", data.seq_length)
    if data.seq_length > positions:
        message = f"is longer than model.max_position_embeddings = {positions}; shorten the samples or raise that"
        yield Problem(("data", "seq_length"), data.seq_length, message)
    vocabulary, tokens = effective("vocab_size"), known_tokens(tokenizer)
    if vocabulary is not None and tokens is not None and tokens > vocabulary:
        message = f"is less than the {tokens} tokens of the tokenizer; make it larger or the tokenizer smaller"
        yield Problem(("model", "vocab_size"), vocabulary, message)


def _model_origin_problems(model: ModelSettings) -> Iterator[Problem]:
    if model.name is not None and model.pretrained is not None:
        message = f"excludes model.name = {model.name}: weights are either released or fresh; keep one of the two"
        yield Problem(("model", "pretrained"), model.pretrained, message)
    elif model.name is not None and model.name not in PRESETS:
        yield Problem(("model", "name"), model.name, "is unknown" + did_you_mean(model.name, PRESETS))
    elif model.pretrained is not None:
        for key, value in model.config_fields().items():
            if key not in NEED_NO_NEW_WEIGHTS:
                message = f"is fixed by the released weights of model.pretrained = {model.pretrained}; remove it"
                yield Problem(("model", key), value, message)
    elif model.name is None:
        for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
            if getattr(model, key) is None:
                message = "is needed when neither model.name nor model.pretrained says which model to train"
                yield Problem(("model", key), None, message)
    if model.revision is not None and model.pretrained is None:
        yield Problem(("model", "revision"), model.revision, "is the revision of model.pretrained, which is not set")


def _model_backend_problems(model: ModelSettings) -> Iterator[Problem]:
    tables = {"hidden_act": ACT2FN, "init_method": INIT_METHODS, "output_layer_init_method": INIT_METHODS}
    for key, table in tables.items():
        value = getattr(model, key)
        if value is not None and value not in table:
            yield Problem(("model", key), value, "is unknown" + did_you_mean(value, table.keys()))
    attention = model.attn_implementation
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    # A name with a slash is a kernel repository on the Hub, which transformers fetches.
    if attention is not None and "/" not in attention and attention not in known:
        message = "is unknown" + did_you_mean(attention, known)
        yield Problem(("model", "attn_implementation"), attention, message)
    elif attention is not None and (package := missing_for_attention(attention)):
        message = f"needs the package {package}, which is not installed; install it, or use sdpa"
        yield Problem(("model", "attn_implementation"), attention, message)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if model.kernels == "triton" and not runs_on(device):
        message = "kernels run on CUDA, which this host has not; use auto, which takes torch's references there"
        yield Problem(("model", "kernels"), model.kernels, message)


def _shape_problems(hidden: int | None, heads: int | None, rotary_pct: float) -> Iterator[Problem]:
    if hidden is None or heads is None or hidden < 1 or heads < 1:
        return
    if hidden % heads:
        message = f"does not divide model.hidden_size = {hidden}; every head has the same number of columns"
        yield Problem(("model", "num_attention_heads"), heads, message)
    elif int(hidden // heads * rotary_pct) % 2 or int(hidden // heads * rotary_pct) < 2:
        rotated = int(hidden // heads * rotary_pct)
        message = f"rotates {rotated} of the {hidden // heads} columns of a head; choose an even number, at least 2"
        yield Problem(("model", "rotary_pct"), rotary_pct, message)


def tokenizer_problems(tokenizer: TokenizerSettings) -> Iterator[Problem]:
    kind = TOKENIZER_KINDS[tokenizer.kind]
    for key, example in kind.needs.items():
        if getattr(tokenizer, key) is None:
            yield Problem(("tokenizer", key), None, f"is needed by kind = {tokenizer.kind}: {example}")
    for key in ("path", "revision", "vocab_size"):
        value = getattr(tokenizer, key)
        if value is not None and key not in kind.needs and key not in kind.takes:
            yield Problem(("tokenizer", key), value, f"means nothing to kind = {tokenizer.kind}; remove it")
        elif key == "vocab_size" and value is not None and value < kind.fewest_tokens:
            message = f"must be at least {kind.fewest_tokens} for kind = {tokenizer.kind}"
            yield Problem(("tokenizer", "vocab_size"), value, message)


def known_tokens(tokenizer: TokenizerSettings) -> int | None:
    """Tokens that the tokenizer will have, where its settings alone tell."""
    return {"trained": tokenizer.vocab_size, "byte": BYTE_TOKENS}.get(tokenizer.kind)


def data_problems(data: DataSettings, evaluates: bool) -> Iterator[Problem]:
    if not data.sources:
        yield Problem(("data", "sources"), [], "is empty; name at least one, for example [{path: stdlib}]")
    for section in ("sources", "eval_sources"):
        for position, source in enumerate(getattr(data, section)):
            yield from _source_problems(source, ("data", section, position))
    if evaluates and not data.eval_sources and data.eval_fraction == 0:
        message = "leaves nothing for train.eval_strategy; hold some documents out or name data.eval_sources"
        yield Problem(("data", "eval_fraction"), data.eval_fraction, message)


def _source_problems(source: SourceSettings, path: tuple[str | int, ...]) -> Iterator[Problem]:
    of_hub = source.path.startswith("hub:")
    if not source.path or (of_hub and not re.fullmatch(r"hub:[\w.-]+(/[\w.-]+)?", source.path)):
        message = "wants stdlib, a file, a folder, a glob, or a Hub dataset as hub:owner/name"
        yield Problem((*path, "path"), source.path, message)
    if source.weight <= 0:
        yield Problem((*path, "weight"), source.weight, "must be above 0")
    if not of_hub:
        for key in ("split", "name", "revision"):
            if changed(source, key):
                message = "belongs to Hub datasets alone (path hub:owner/name); remove it"
                yield Problem((*path, key), getattr(source, key), message)


def train_problems(train: Any, data: DataSettings) -> Iterator[Problem]:
    yield from _batch_problems(train, data)
    yield from _schedule_problems(train)
    yield from _strategy_problems(train)
    yield from _best_model_problems(train)
    yield from _optimizer_problems(train)
    yield from _recompute_problems(train)
    yield from _log_problems(train)


def _log_problems(train: Any) -> Iterator[Problem]:
    for key in ("log_level", "log_level_replica"):
        level = getattr(train, key)
        if level not in trainer_log_levels:
            yield Problem(("train", key), level, "is unknown" + did_you_mean(level, trainer_log_levels))
    known = [*INTEGRATION_TO_CALLBACK, "all", "none"]
    for name in [train.report_to] if isinstance(train.report_to, str) else train.report_to or []:
        if name not in known:
            message = f"{name} is unknown" + did_you_mean(name, known)
            yield Problem(("train", "report_to"), train.report_to, message)


def _batch_problems(train: Any, data: DataSettings) -> Iterator[Problem]:
    micro, accumulation, total = (
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
        train.global_batch_size,
    )
    if total is None or micro < 1:
        return
    if total % micro:
        message = f"is no multiple of train.per_device_train_batch_size = {micro}"
        yield Problem(("train", "global_batch_size"), total, message)
    elif accumulation > 1 and total % (micro * accumulation):
        message = (
            f"is no multiple of per_device_train_batch_size x gradient_accumulation_steps = {micro * accumulation}; "
            "leave the accumulation out, it follows from the world"
        )
        yield Problem(("train", "global_batch_size"), total, message)


def _recompute_problems(train: Any) -> Iterator[Problem]:
    kwargs = train.activation_checkpointing_kwargs
    if kwargs is not None and train.activation_checkpointing in (None, False, "none", "selective"):
        message = "belongs to train.activation_checkpointing = full; set that, or remove it"
        yield Problem(("train", "activation_checkpointing_kwargs"), kwargs, message)


def fp8_problems(train: Any, model: ModelSettings, compiles: bool) -> Iterator[Problem]:
    if train.precision != "fp8":
        return
    if compiles:
        message = "runs each linear of a block outside of what train.torch_compile makes; remove that, or use bf16"
        yield Problem(("train", "precision"), "fp8", message)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if reason := reason_against_device(device):
        yield Problem(("train", "precision"), "fp8", f"cannot be computed here: {reason}; use bf16")
    hidden = model.hidden_size or PRESETS.get(model.name or "", {}).get("hidden_size")
    if hidden is not None and hidden % MULTIPLE:
        message = f"wants model.hidden_size to be a multiple of {MULTIPLE}, and it is {hidden}; use bf16"
        yield Problem(("train", "precision"), "fp8", message)


def _optimizer_problems(train: Any) -> Iterator[Problem]:
    optimizer = getattr(train.optim, "value", train.optim)
    if package := missing_for_optimizer(optimizer):
        message = f"needs the package {package}, which is not installed; install it, or choose another optimizer"
        yield Problem(("train", "optim"), optimizer, message)
    if problem := arguments_problem(optimizer, train.optim_args):
        yield Problem(("train", "optim_args"), train.optim_args, problem)


def master_weights_problems(train: Any) -> Iterator[Problem]:
    """Of a run without DeepSpeed, where our own optimizer keeps the master weights."""
    precision = precision_here(train.precision)
    if not precision_of(precision).master:
        return
    for key in DDP_KEYS:
        if changed(train, key):
            message = f"does nothing: train.precision = {precision} reduces gradients in fp32 by itself; remove it"
            yield Problem(("train", key), getattr(train, key), message)
    optimizer = getattr(train.optim, "value", train.optim)
    if optimizer not in WITH_MASTER_WEIGHTS:
        message = (
            f"keeps no fp32 master weights, which train.precision = {precision} needs; "
            f"use {' or '.join(WITH_MASTER_WEIGHTS)}, or train.precision = amp"
        )
        yield Problem(("train", "optim"), optimizer, message)


def _schedule_problems(train: Any) -> Iterator[Problem]:
    if train.lr_decay_style is None:
        for key in NEOX_SCHEDULE_KEYS:
            if changed(train, key):
                message = "belongs to GPT-NeoX's schedules; set train.lr_decay_style, or use lr_scheduler_kwargs"
                yield Problem(("train", key), getattr(train, key), message)
        yield from _hf_schedule_problems(train)
        return
    for key in HF_SCHEDULE_KEYS:
        if changed(train, key):
            message = (
                f"excludes train.lr_decay_style = {train.lr_decay_style}, whose warm-up is lr_warmup_fraction; "
                "keep one of the two schedules"
            )
            yield Problem(("train", key), getattr(train, key), message)
    if train.min_lr > train.learning_rate:
        yield Problem(("train", "min_lr"), train.min_lr, f"is above train.learning_rate = {train.learning_rate}")


def _hf_schedule_problems(train: Any) -> Iterator[Problem]:
    """Makes the schedule of transformers once, for an optimizer of nothing: each kind wants arguments of its own."""
    rate, warmup, steps = train.learning_rate, train.warmup_steps, train.max_steps
    if rate < 0 or warmup < 0 or steps < 1:
        return  # told as numbers out of their range
    nothing = torch.optim.SGD([torch.zeros(1)], lr=rate)
    warmup = int(warmup) if warmup >= 1 else math.ceil(steps * warmup)
    further = train.lr_scheduler_kwargs or {}
    try:
        further = json.loads(further) if isinstance(further, str) else further
        get_scheduler(train.lr_scheduler_type, nothing, warmup, steps, further)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        message = f"cannot be made with lr_scheduler_kwargs = {further}: {error}"
        yield Problem(("train", "lr_scheduler_type"), train.lr_scheduler_type, message)


def _strategy_problems(train: Any) -> Iterator[Problem]:
    for key in ("logging_strategy", "eval_strategy", "save_strategy"):
        if getattr(train, key) == "epoch":
            yield Problem(("train", key), "epoch", "streams are endless and have no epochs; use steps")
    for key in ("logging_steps", "eval_steps", "save_steps", "warmup_steps"):
        value = getattr(train, key)
        if value is not None and value > 1 and value != int(value):
            yield Problem(("train", key), value, "must be a whole number of steps, or a share of the run below 1")
    if isinstance(train.save_schedule, list) and any(step < 0 for step in train.save_schedule):
        yield Problem(("train", "save_schedule"), train.save_schedule, "steps must be at least 0")
    if train.save_schedule != "every" and changed(train, "save_strategy"):
        message = "excludes another train.save_schedule than every; keep one of the two"
        yield Problem(("train", "save_strategy"), train.save_strategy, message)
    if train.eval_strategy == "no" and train.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        yield Problem(
            ("train", "lr_scheduler_type"),
            train.lr_scheduler_type,
            "follows the evaluation loss; set train.eval_strategy",
        )


def _best_model_problems(train: Any) -> Iterator[Problem]:
    metric = train.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in METRICS:
        message = f"is not what an evaluation measures; use {' or '.join(METRICS)}"
        yield Problem(("train", "metric_for_best_model"), metric, message)
    if train.save_strategy == "best" and train.eval_strategy != "steps":
        message = "saves what an evaluation finds to be the best, and there is none; set eval_strategy: steps"
        yield Problem(("train", "save_strategy"), "best", message)
    if not train.load_best_model_at_end or train.save_strategy == "best":
        return
    eval_steps = train.eval_steps or train.logging_steps
    where = ("train", "load_best_model_at_end")
    if train.eval_strategy != "steps" or train.save_schedule != "every" or train.save_strategy != "steps":
        yield Problem(where, True, "needs eval_strategy: steps with save_schedule: every, or save_strategy: best")
    elif train.save_steps % eval_steps:
        message = f"needs save_steps = {train.save_steps:g} to be a multiple of eval_steps = {eval_steps:g}"
        yield Problem(where, True, message)


def hub_problems(hub: HubSettings) -> Iterator[Problem]:
    """The rest is checked by `HubSettings` itself."""
    if hub.require_push and not hub.push:
        yield Problem(("hub", "require_push"), True, "does nothing while hub.push is false")
