"""The adapters of a PEFT model, in files that PEFT and transformers load onto the base model, which they name.

What is an adapter's, and under which name, PEFT says. Their files hold nothing of the base model.
"""

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from neox_hf.checkpoint.host_memory import HostMemory
from neox_hf.checkpoint.model_files import save_tokenizer
from neox_hf.checkpoint.partitioned import is_partitioned, whole_shape
from neox_hf.checkpoint.weight_names import Weight
from neox_hf.checkpoint.weights import WeightFiles
from neox_hf.parallel.collectives import from_first_rank
from neox_hf.parallel.topology import Topology

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
IN_A_PEFT_MODEL = "base_model.model."


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter on its way to disk.

    folder: of its files, empty or with a slash at its end. config: PEFT's, as it is to be saved.
    """

    folder: str
    weights: list[Weight]
    config: Any

    def files(
        self, topology: Topology, dtype: torch.dtype | None = None, memory: HostMemory | None = None
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """What this rank writes of its weights: nothing, or the one file. See `WeightFiles`."""
        for _, tensors in WeightFiles(self.weights, topology, dtype, sys.maxsize, memory).mine():
            yield self.folder + ADAPTER, tensors


def has_adapters(model: PreTrainedModel, topology: Topology) -> bool:
    """Whether a model is saved as adapters. Where it is split, PEFT's layers would be halves of which nobody knows, and
    it is saved as any other."""
    return is_adapted(model) and not topology.splits_model


def is_adapted(model: nn.Module | None) -> bool:
    """Whether PEFT has wrapped a model, or put adapters into it."""
    peft = sys.modules.get("peft")  # which made the model, if it has adapters
    return peft is not None and (isinstance(model, peft.PeftModel) or getattr(model, "_hf_peft_config_loaded", False))


def adapters_of(model: PreTrainedModel, topology: Topology) -> list[Adapter]:
    """The adapters that this rank helps to write: all, on the first rank and where parameters are dealt out; else none.
    Every rank calls it."""
    if not has_adapters(model, topology):
        return []
    state = model.state_dict(keep_vars=True)
    partitioned = any(map(is_partitioned, state.values()))
    if topology.rank != 0 and not partitioned:
        return []
    holders = topology if partitioned else Topology.single()
    return [
        Adapter(folder, _weights(model, name, state, holders), _config(model, name))
        for name, folder in _folders(model).items()
    ]


def save_adapter_files(
    adapters: list[Adapter], directory: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write everything that belongs beside the weights of adapters. No `config.json`: where there is one, transformers
    looks for the base model beside it.

    Raises:
        OSError: something cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for adapter in adapters:
        adapter.config.save_pretrained(str(directory / adapter.folder))
    if tokenizer is not None:
        save_tokenizer(tokenizer, directory)


def _folders(model: PreTrainedModel) -> dict[str, str]:
    """The folder of each adapter: as PEFT has it, but transformers saves what is active where it looks first."""
    first = model.active_adapters()[0] if isinstance(model, PreTrainedModel) else "default"
    return {name: "" if name == first else f"{name}/" for name in model.peft_config}


def _weights(model: PreTrainedModel, adapter: str, state: dict[str, Tensor], holders: Topology) -> list[Weight]:
    from peft import get_peft_model_state_dict

    prefix = IN_A_PEFT_MODEL if isinstance(model, PreTrainedModel) else ""
    found = get_peft_model_state_dict(model, state, adapter)
    own_names = {tensor: name for name, tensor in state.items()}  # tensors hash by identity
    # PEFT may ask the Hub whether the base model had other embeddings: one rank's answer is that of all.
    chosen = from_first_rank(holders, lambda: {key: own_names.get(tensor) for key, tensor in found.items()})
    tensors = {key: found[key] if name is None else state[name] for key, name in chosen.items()}
    return [Weight((prefix + key,), tensor, whole_shape(tensor), None) for key, tensor in tensors.items()]


def _config(model: PreTrainedModel, adapter: str) -> Any:
    """What `PeftModel.save_pretrained` would save."""
    config = copy.deepcopy(model.peft_config[adapter])
    base = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    config.inference_mode = True
    if config.task_type is None:
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return config
