"""The weights of a model, each under its name on disk.

transformers calls the LM head `lm_head` in memory and `embed_out` on disk, and has changed its mind before. The head is
therefore found as the model's output embedding, and either spelling is read.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from neox_hf.checkpoint.partitioned import whole_shape
from neox_hf.parallel.shards import Shard, shards_of

HEAD_ON_DISK = "embed_out"
HEAD_SPELLINGS = (HEAD_ON_DISK, "lm_head")


@dataclass(frozen=True, eq=False)
class Weight:
    """One tensor of a model.

    spellings: its names on disk, the one we write first; more than one if it is tied or was renamed.
    tensor: what this rank holds: all of it, a tensor shard, a ZeRO-3 parameter, or nothing (on `meta`).
    shape: on disk. shard: which part of it `tensor` is; None if it is no tensor shard.
    """

    spellings: tuple[str, ...]
    tensor: Tensor
    shape: tuple[int, ...]
    shard: Shard | None

    @property
    def name(self) -> str:
        return self.spellings[0]

    @property
    def is_local(self) -> bool:
        return self.tensor.device.type != "meta"

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype


def weights_of(model: PreTrainedModel) -> list[Weight]:
    """Every parameter and persistent buffer of a model, in its order; tied ones once, those on `meta` included."""
    spell, shards = _spelling(model), shards_of(model)
    names_of: dict[Tensor, list[str]] = {}  # tensors hash by identity: tied names meet in one entry
    for name, tensor in model.state_dict(keep_vars=True).items():
        names_of.setdefault(tensor, []).extend(spell(name))
    return [
        Weight(
            tuple(dict.fromkeys(names)),
            tensor,
            shards[tensor].shape if tensor in shards else whole_shape(tensor),
            shards.get(tensor),
        )
        for tensor, names in names_of.items()
    ]


def hf_names(model: PreTrainedModel) -> dict[nn.Parameter, str]:
    """Each parameter's name on disk; a tied parameter has one."""
    spell = _spelling(model)
    return {parameter: spell(name)[0] for name, parameter in model.named_parameters()}


def _spelling(model: PreTrainedModel) -> Callable[[str], tuple[str, ...]]:
    """A function from a name in the model to its names on disk, the one we write first."""
    head = model.get_output_embeddings()
    if head is None or model.base_model_prefix != "gpt_neox":
        return lambda name: (name,)
    prefix = next(path for path, module in model.named_modules() if module is head)

    def spell(name: str) -> tuple[str, ...]:
        if not name.startswith(f"{prefix}."):
            return (name,)
        return tuple(spelling + name.removeprefix(prefix) for spelling in HEAD_SPELLINGS)

    return spell
