"""What a `NeoXTrainer` cannot do together, said before it has begun. Recipes have checks of their own."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from neox_hf.checkpoint.adapters import is_adapted
from neox_hf.data import TokenStream
from neox_hf.parallel.topology import Topology
from neox_hf.training.arguments import NeoXTrainingArguments

logger = logging.getLogger(__name__)


def check_together(
    model: nn.Module | None,
    args: NeoXTrainingArguments,
    topology: Topology,
    train_dataset: Any,
    others: Mapping[str, Any],
) -> None:
    """others: what else HF's Trainer is given, by name.

    Raises:
        ValueError: two of these do not go together.
    """
    of_a_stream = isinstance(train_dataset, TokenStream)
    if of_a_stream and args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} with a TokenStream: transformers smooths over "
            "labels moved on by one, and a stream's labels are moved already; leave it at 0"
        )
    if of_a_stream and args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size with a TokenStream: its position counts samples of steps of one size; lower "
            "per_device_train_batch_size"
        )
    if args.z_loss and (args.label_smoothing_factor or others.get("compute_loss_func") is not None):
        which = "label_smoothing_factor" if args.label_smoothing_factor else "compute_loss_func"
        raise ValueError(f"z_loss={args.z_loss} is part of the model's own loss, which {which} replaces; drop one")
    if args.numeric.fp8 and others.get("model_init") is not None:
        raise ValueError("precision='fp8' keeps scales for one model; give model= in place of model_init=")
    if topology.splits_model and is_adapted(model):
        raise ValueError(
            f"a model with PEFT's adapters does not go with tensor={topology.tensor}, pipeline={topology.pipeline}: "
            "its layers know of no split; use replicas, parallel.zero_stage or activation_checkpointing"
        )
    if args.push_to_hub and args.hub_strategy != "end":
        logger.warning(
            "push_to_hub: save_model pushes, and checkpoints stay here; publisher=HubPublisher(...) pushes each of them"
        )
