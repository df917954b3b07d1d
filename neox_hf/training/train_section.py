"""The `train:` section of a recipe: fields of `NeoXTrainingArguments`, less those that another section owns.

The schema is made from the fields' annotations, without constructing the arguments: their `__post_init__` starts
the process group.
"""

import dataclasses
from typing import Any

from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.field_types import value_types

OWNED_ELSEWHERE = {
    "accelerator_config": "batches come from the recipe's own stream; see data",
    "bf16": "belongs to train.precision (amp or bf16)",
    "bf16_full_eval": "belongs to train.precision; evaluation runs in the precision of training",
    "data_seed": "belongs to data.seed",
    "dataloader_drop_last": "belongs to data; streams are endless and have no last batch",
    "dataloader_in_order": "belongs to data; samples always come in the order of the stream",
    "dataloader_multiprocessing_context": "belongs to data.workers",
    "dataloader_num_workers": "belongs to data.workers",
    "dataloader_persistent_workers": "belongs to data.workers",
    "dataloader_pin_memory": "belongs to data; memory is pinned where there is a CUDA device",
    "dataloader_prefetch_factor": "belongs to data.workers",
    "deepspeed": "belongs to parallel (zero_stage, tensor, pipeline)",
    "fp16": "belongs to train.precision",
    "fp16_full_eval": "belongs to train.precision; evaluation runs in the precision of training",
    "fsdp": "belongs to parallel.zero_stage",
    "fsdp_config": "belongs to parallel.zero_stage",
    "gradient_checkpointing": "belongs to train.activation_checkpointing",
    "gradient_checkpointing_kwargs": "belongs to train.activation_checkpointing_kwargs",
    "hub_always_push": "belongs to hub.push; checkpoints are pushed in order, none is left out",
    "hub_model_id": "belongs to hub.repo_id",
    "hub_private_repo": "belongs to hub.private",
    "hub_revision": "belongs to hub.push; a checkpoint is pushed as revision step<N>, the final model to main",
    "hub_strategy": "belongs to hub.push",
    "hub_token": "is never written in a recipe; set HF_TOKEN or run `hf auth login`",
    "length_column_name": "belongs to data; samples all have data.seq_length tokens",
    "parallelism_config": "belongs to parallel",
    "push_to_hub": "belongs to hub.push",
    "train_sampling_strategy": "belongs to data.shuffle",
    "use_cpu": "is set by the recipe itself where there is no CUDA device",
}
"""Fields of HF's that have another owner here: each with who that is."""

NOT_OFFERED = {
    "auto_find_batch_size": "the samples of a step are fixed by the recipe; lower per_device_train_batch_size",
    "do_eval": "belongs to train.eval_strategy",
    "do_predict": "a pretraining run has nothing to predict",
    "do_train": "a pretraining run always trains; use --dry-run to look at a recipe",
    "enable_jit_checkpoint": "SIGTERM and SIGUSR1 always save a checkpoint",
    "ignore_data_skip": "the position in the stream is always restored, never replayed",
    "include_num_input_tokens_seen": "consumed_tokens is always logged",
    "label_names": "a batch's names are fixed by data",
    "label_smoothing_factor": "transformers smooths over labels moved on by one; a batch's labels are moved already",
    "liger_kernel_config": "Liger has no GPT-NeoX kernels; see model.kernels",
    "local_rank": "is set by the launcher",
    "logging_nan_inf_filter": "a NaN is never hidden from the log; see train.nan_policy",
    "neftune_noise_alpha": "is for fine-tuning; noise in the embeddings is not offered here",
    "num_train_epochs": "streams are endless; set train.max_steps",
    "remove_unused_columns": "a batch's names are fixed by data",
    "save_on_each_node": "all ranks share one output directory",
    "save_only_model": "a checkpoint can always be resumed",
    "use_liger_kernel": "Liger has no GPT-NeoX kernels; see model.kernels",
}
"""Fields of HF's that would do nothing or harm here: each with the reason."""

REFUSED = OWNED_ELSEWHERE | NOT_OFFERED

METRICS = ("loss", "perplexity")
"""What an evaluation of a recipe finds out, each with or without transformers' prefix `eval_`; less is better."""


def _settle_best(train: Any) -> None:
    """Say which evaluation is the best one where transformers would not know."""
    if train.save_strategy == "best" and train.metric_for_best_model is None:
        object.__setattr__(train, "metric_for_best_model", "loss")


def _train_settings() -> type:
    annotations = value_types(NeoXTrainingArguments)
    fields = [
        (field.name, annotations[field.name], dataclasses.field(default=field.default))
        if field.default_factory is dataclasses.MISSING
        else (field.name, annotations[field.name], dataclasses.field(default_factory=field.default_factory))
        for field in dataclasses.fields(NeoXTrainingArguments)
        if field.name not in REFUSED
    ]
    # Samples in one optimizer step over all ranks: the accumulation that this takes depends on the world.
    fields.append(("global_batch_size", int | None, dataclasses.field(default=None)))
    methods = {"__post_init__": _settle_best}
    return dataclasses.make_dataclass("TrainSettings", fields, frozen=True, kw_only=True, namespace=methods)


TrainSettings = _train_settings()
"""A frozen dataclass: the fields of `NeoXTrainingArguments` that a recipe may set, and `global_batch_size`."""
TrainSettings.__module__ = __name__  # so that a recipe can be pickled
