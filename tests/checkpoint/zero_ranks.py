"""One tiny model trained inside each kind of optimizer container, on gloo ranks that share a replica's data."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from neox_hf.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    hf_names,
    load_optimizer,
    open_checkpoint,
    write_optimizer,
)
from neox_hf.checkpoint.boxes import Box, fill_boxes
from neox_hf.parallel.shards import shards_of
from neox_hf.parallel.topology import Topology
from tests.checkpoint.conftest import build

BATCH, LENGTH = 4, 8
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@dataclass(frozen=True)
class Kind:
    """A container: ZeRO stage (0: a torch optimizer, gradients averaged by hand) and DeepSpeed's settings."""

    stage: int
    dtype: torch.dtype = torch.float32
    zero: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


BF16 = {"bf16": {"enabled": True, "immediate_grad_update": True}}
KINDS = {
    "torch": Kind(0),
    "zero1": Kind(1),
    "zero2": Kind(2),
    "zero3": Kind(3),
    "zero3_in_pieces": Kind(3, zero={"sub_group_size": 600, "stage3_param_persistence_threshold": 0}),
    "zero2_offload": Kind(2, zero=OFFLOAD),
    "zero3_offload": Kind(3, zero=OFFLOAD),
    "master": Kind(0, torch.bfloat16),
    "bf16_optimizer": Kind(1, torch.bfloat16, settings={**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
    "bf16_zero1": Kind(1, torch.bfloat16, settings=BF16),
    "bf16_zero2": Kind(2, torch.bfloat16, settings=BF16),
    "bf16_zero3": Kind(3, torch.bfloat16, settings=BF16),
    "bf16_zero2_offload": Kind(2, torch.bfloat16, zero=OFFLOAD, settings=BF16),
}
FP32 = [name for name, kind in KINDS.items() if kind.dtype == torch.float32]
LOW = [name for name, kind in KINDS.items() if kind.dtype == torch.bfloat16]


class Trained:
    """A model inside a container. `step(n)` trains on the n-th batch and returns the loss over all ranks."""

    def __init__(self, kind: Kind, topology: Topology, seed: int, tied: bool = False) -> None:
        self.topology = topology
        self.model = build("ours", seed=seed, dtype=kind.dtype, tie_word_embeddings=tied)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(0.1)
        optimizer = _optimizer(self.model, kind)
        if kind.stage == 0:
            self.optimizer, self._engine = optimizer, None
        else:
            self._engine = _engine(self.model, optimizer, kind)
            self.optimizer = self._engine.optimizer

    def step(self, number: int) -> float:
        mine = batch(number).chunk(self.topology.data)[self.topology.data_rank]
        loss = (self._engine or self.model)(input_ids=mine, labels=mine).loss
        if self._engine is not None:
            self._engine.backward(loss)
            self._engine.step()
        else:
            self._step_by_hand(loss)
        total = loss.detach().double()
        dist.all_reduce(total)
        return float(total / self.topology.data)

    def _step_by_hand(self, loss: Tensor) -> None:
        loss.backward()
        for parameter in self.model.parameters():
            gradient = parameter.grad.float()
            dist.all_reduce(gradient)
            parameter.grad.copy_(gradient / self.topology.data)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, output_dir: Path, step: int) -> Path:
        writer = CheckpointWriter(
            output_dir, step, rank=self.topology.rank, world_size=self.topology.world_size, barrier=dist.barrier
        )
        writer.write_weights(self.model, topology=self.topology)
        write_optimizer(writer, self.optimizer, hf_names(self.model), shards_of(self.model), self.topology)
        return writer.commit()

    def load(self, checkpoint: Checkpoint) -> None:
        checkpoint.load_weights(self.model, topology=self.topology)
        names, shards = hf_names(self.model), shards_of(self.model)
        load_optimizer(self.optimizer, names, shards, checkpoint, self.topology)


def batch(number: int) -> Tensor:
    return torch.randint(61, (BATCH, LENGTH), generator=torch.Generator().manual_seed(number))


def _optimizer(model: PreTrainedModel, kind: Kind) -> torch.optim.Optimizer:
    from neox_hf.training.optimizers import MasterAdamW

    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    masters = kind.stage == 0 and kind.dtype != torch.float32
    return (MasterAdamW if masters else torch.optim.AdamW)(groups, lr=1e-3, betas=(0.9, 0.95), fused=False)


def _engine(model: nn.Module, optimizer: torch.optim.Optimizer, kind: Kind) -> Any:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Stage 3 would replace `F.linear` of the whole process by one that rounds otherwise.
        "zero_optimization": {"stage": kind.stage, "memory_efficient_linear": False, **kind.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **kind.settings,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def boxes_of(checkpoint: Checkpoint) -> dict[tuple[str, str], Tensor]:
    """Every slot of every parameter, whole, by slot and name; and every weight."""
    from safetensors.torch import load_file

    whole = {}
    for slot in checkpoint.json("state/optimizer.json")["slots"]:
        boxes = checkpoint.boxes(f"optimizer.{slot}")
        for name in boxes.names():
            like = boxes.find(name)[0]
            whole[slot, name] = torch.empty(like.shape, dtype=like.dtype)
            fill_boxes([Box.whole(name, whole[slot, name])], boxes)
    for path in checkpoint.path.glob("*.safetensors"):
        whole.update({("weights", name): tensor for name, tensor in load_file(path).items()})
    return whole


def same(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


Result = dict[str, Any]


def all_pairs(rank: int, folder: str, world_size: int, names: list[str], pairs: list[tuple[str, str]]) -> Result:
    """Train and save in each container; load into others, save again at once, and go on.

    Returns, for each container, the losses of the run that was never interrupted and, for each pair, whether what was
    loaded is bit for bit what had been saved, the losses after, and whether the end is the same bit for bit.
    """
    topology = Topology.from_world(world_size, rank)
    root, whole, ends = Path(folder), {}, {}
    for name in names:
        trained = Trained(KINDS[name], topology, seed=1)
        for step in range(3):
            trained.step(step)
        trained.save(root / name, 3)
        whole[name] = [trained.step(step) for step in range(3, 6)]
        ends[name] = boxes_of(open_checkpoint(trained.save(root / name, 6)))
    outcomes = {}
    for source, target in pairs:
        saved = open_checkpoint(root / source / "checkpoint-3")
        trained = Trained(KINDS[target], topology, seed=2)
        trained.load(saved)
        again = open_checkpoint(trained.save(root / f"{source}-{target}", 3))
        exact = same(boxes_of(saved), boxes_of(again)) and documents_agree(saved, again)
        losses = [trained.step(step) for step in range(3, 6)]
        end = boxes_of(open_checkpoint(trained.save(root / f"{source}-{target}", 6)))
        outcomes[source, target] = {"exact": exact, "losses": losses, "same_end": same(end, ends[source])}
    return {"whole": whole, "outcomes": outcomes}


def documents_agree(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints tell the same of every parameter, and of groups what both optimizers know."""
    left, right = (checkpoint.json("state/optimizer.json") for checkpoint in (one, other))
    for ours, theirs in zip(left["groups"], right["groups"], strict=True):
        common = ours["hyper"].keys() & theirs["hyper"].keys()
        if ours["names"] != theirs["names"] or any(ours["hyper"][key] != theirs["hyper"][key] for key in common):
            return False
    return all(left[key] == right[key] for key in ("optimizer", "slots", "parameters"))


def each_pair(names: list[str]) -> Iterator[tuple[str, str]]:
    return ((source, target) for source in names for target in names)


RunRanks = Callable[..., list[Any]]
