"""What one container of optimizer state has saved, any other loads bit for bit and goes on with."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from neox_hf.checkpoint import CheckpointWriter, open_checkpoint, write_optimizer
from neox_hf.errors import CheckpointError
from neox_hf.parallel.topology import Topology
from tests.checkpoint.zero_ranks import FP32, KINDS, LOW, Trained, all_pairs, boxes_of, each_pair, same
from tests.gloo import run_ranks

RING = [
    ("torch", "zero1"),
    ("zero1", "zero2"),
    ("zero2", "zero3"),
    ("zero3", "zero3"),
    ("zero3", "zero3_in_pieces"),
    ("zero3_in_pieces", "zero2_offload"),
    ("zero2_offload", "torch"),
    ("zero1", "zero1"),
]
LOW_RING = [
    ("master", "bf16_optimizer"),
    ("bf16_optimizer", "bf16_optimizer"),
    ("bf16_optimizer", "bf16_zero2"),
    ("bf16_zero2", "bf16_zero3"),
    ("bf16_zero3", "master"),
]


def check(folder: Path, pairs: list[tuple[str, str]]) -> None:
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    result = run_ranks(all_pairs, 2, str(folder), 2, names, pairs)[0]
    for (source, target), outcome in result["outcomes"].items():
        assert outcome["exact"], f"{source} -> {target}: what was loaded is not what was saved"
        assert outcome["losses"] == pytest.approx(result["whole"][source], rel=1e-5), f"{source} -> {target}"
        assert source != target or outcome["same_end"], f"{source} resumed in itself ends elsewhere"


def test_containers_in_fp32(tmp_path):
    check(tmp_path, RING)


def test_containers_with_masters(tmp_path):
    check(tmp_path, LOW_RING)


@pytest.mark.slow
@pytest.mark.parametrize("names", [FP32, LOW], ids=["fp32", "bf16"])
def test_every_pair_of_containers(tmp_path, names):
    check(tmp_path, list(each_pair(names)))


def save_in_two(rank: int, folder: str) -> list[float]:
    trained = Trained(KINDS["zero3"], Topology.from_world(2, rank), seed=1, tied=True)
    for step in range(3):
        trained.step(step)
    trained.save(Path(folder), 3)
    return [trained.step(step) for step in range(3, 6)]


def resume_in_four(rank: int, folder: str) -> list[tuple[bool, list[float]]]:
    checkpoint = open_checkpoint(Path(folder) / "checkpoint-3")
    outcomes = []
    for name in ("zero1", "zero3"):
        trained = Trained(KINDS[name], Topology.from_world(4, rank), seed=2, tied=True)
        trained.load(checkpoint)
        again = open_checkpoint(trained.save(Path(folder) / name, 3))
        exact = same(boxes_of(checkpoint), boxes_of(again))
        outcomes.append((exact, [trained.step(step) for step in range(3, 6)]))
    return outcomes


def test_another_number_of_ranks_and_a_tied_head(tmp_path):
    whole = run_ranks(save_in_two, 2, str(tmp_path))[0]
    for exact, losses in run_ranks(resume_in_four, 4, str(tmp_path))[0]:
        assert exact
        assert losses == pytest.approx(whole, rel=1e-5)


def odd_cases(rank: int, folder: str) -> list[str]:
    """Before the first step; steps that ZeRO cannot have; a checkpoint that one rank alone cannot read."""
    topology, root = Topology.from_world(2, rank), Path(folder)
    fresh = Trained(KINDS["bf16_optimizer"], topology, seed=1)
    fresh.save(root / "fresh", 0)
    other = Trained(KINDS["bf16_zero3"], topology, seed=2)
    other.load(open_checkpoint(root / "fresh" / "checkpoint-0"))
    assert other.step(0) == fresh.step(0)

    by_hand = Trained(KINDS["torch"], topology, seed=1)
    by_hand.step(0)
    by_hand.optimizer.state[next(by_hand.model.parameters())]["step"] += 1
    by_hand.save(root / "uneven", 1)
    messages = [refusal(Trained(KINDS["zero1"], topology, seed=1), root / "uneven" / "checkpoint-1")]

    trained = Trained(KINDS["zero1"], topology, seed=1)
    trained.step(0)
    trained.save(root / "whole", 1)
    before = trained.optimizer.single_partition_of_fp32_groups[0].clone()
    dist.barrier()
    if rank == 1:
        root = Path(folder) / "nowhere"
    messages.append(refusal(trained, Path(folder) / "whole" / "checkpoint-1", spoil=rank == 1))
    assert torch.equal(before, trained.optimizer.single_partition_of_fp32_groups[0])
    return messages


def refusal(trained: Trained, path: Path, spoil: bool = False) -> str:
    checkpoint = open_checkpoint(path)
    if spoil:
        stock = checkpoint.json
        checkpoint.json = lambda relative: {**stock(relative), "optimizer": "Lion"}
    with pytest.raises(CheckpointError) as refused:
        trained.load(checkpoint)
    return str(refused.value)


def test_odd_cases(tmp_path):
    for rank, (uneven, spoiled) in enumerate(run_ranks(odd_cases, 2, str(tmp_path))):
        assert "have taken different numbers of steps, which ZeRO cannot continue" in uneven
        assert spoiled.startswith("rank 1: " if rank == 0 else "the checkpoint's optimizer is Lion")


def test_an_unknown_container_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="the state of a object cannot be saved; use a torch optimizer"):
        write_optimizer(CheckpointWriter(tmp_path, 1), object(), {})
