"""Generators continue bit for bit in the same world, and by a rule in another."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from neox_hf.checkpoint import CheckpointWriter, open_checkpoint, restore_rng, rng_state, write_rng
from neox_hf.checkpoint.rng import set_rng_state
from neox_hf.parallel.topology import Topology


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def draw() -> list[float]:
    """Numbers of every generator. The normal ones come in pairs, of which the generators keep the second."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        *torch.rand(2).tolist(),
        *torch.randn(3).tolist(),
    ]


def write(output_dir: Path, world_size: int = 1) -> Path:
    meeting = threading.Barrier(world_size, timeout=30)

    def run(rank: int) -> Path:
        writer = CheckpointWriter(output_dir, 6, rank=rank, world_size=world_size, barrier=meeting.wait)
        write_rng(writer)
        return writer.commit()

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))[0]  # noqa: RUF015 - all ranks must be waited for


def test_every_generator_continues(tmp_path):
    seed_all(5)
    draw()
    path = write(tmp_path)
    wanted = [draw() for _ in range(4)]
    seed_all(6)
    restore_rng(open_checkpoint(path), Topology.single())
    assert [draw() for _ in range(4)] == wanted


def test_reading_the_state_changes_nothing():
    seed_all(5)
    state = rng_state()
    wanted = draw()
    set_rng_state(state)
    assert draw() == wanted


def test_each_rank_has_its_own_file(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path, world_size=2))
    for rank in range(2):
        assert checkpoint.has(f"state/rng-{rank}-of-2.safetensors")
        restore_rng(checkpoint, Topology(data=2, rank=rank))


def drawn_at(checkpoint, topology: Topology) -> list[float]:
    seed_all(99)
    restore_rng(checkpoint, topology)
    return draw()


def drawn_after_restore(checkpoint, rank: int, world_size: int) -> list[float]:
    return drawn_at(checkpoint, Topology(data=world_size, rank=rank))


def test_another_world_is_seeded_by_a_rule_and_says_so(tmp_path, caplog):
    seed_all(5)
    first = open_checkpoint(write(tmp_path / "a", world_size=2))
    seed_all(6)
    second = open_checkpoint(write(tmp_path / "b", world_size=2))
    drawn = {
        (name, rank, world): drawn_after_restore(checkpoint, rank, world)
        for name, checkpoint in (("first", first), ("second", second))
        for rank, world in ((0, 1), (0, 4), (1, 4), (3, 4))
    }
    assert len({tuple(numbers) for numbers in drawn.values()}) == len(drawn)
    assert drawn_after_restore(first, 3, 4) == drawn["first", 3, 4]
    assert "written by 1 pipeline x 2 data x 1 tensor processes, this run has 1 pipeline x 4 data" in caplog.text
    assert "rank 3 seeds its random number generators with" in caplog.text


def write_layout(output_dir: Path, **sizes: int) -> Path:
    """A checkpoint of another layout, with one rank's generators standing for all."""
    world = sizes["pipeline"] * sizes["data"] * sizes["tensor"]
    writers = [CheckpointWriter(output_dir, 6, rank=rank, world_size=world) for rank in range(world)]
    for writer in writers:
        write_rng(writer)
        torch.rand(1)
    for writer in writers[1:]:
        writer.seal()
    return writers[0].commit(sizes)


def test_the_layout_counts_and_not_the_number_of_ranks(tmp_path, caplog):
    seed_all(5)
    checkpoint = open_checkpoint(write_layout(tmp_path, pipeline=1, data=2, tensor=2))
    places = [Topology(pipeline=2, tensor=2, rank=rank) for rank in range(4)]
    drawn = [drawn_at(checkpoint, place) for place in places]
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3], "tensor ranks draw the same, stages do not"
    assert "1 pipeline x 2 data x 2 tensor processes, this run has 2 pipeline x 1 data x 2 tensor" in caplog.text
    assert drawn[0] != drawn_at(checkpoint, Topology(pipeline=2, data=2, rank=0)), "the sizes count"
    caplog.clear()
    same = [drawn_at(checkpoint, Topology(data=2, tensor=2, rank=rank)) for rank in range(4)]
    assert len({tuple(numbers) for numbers in same}) == 4, "each continues its own"
    assert not caplog.text


@pytest.mark.gpu
def test_the_device_generator_continues(tmp_path):
    path = write(tmp_path)
    wanted = torch.rand(4, device="cuda").tolist()
    torch.cuda.manual_seed(0)
    restore_rng(open_checkpoint(path), Topology.single())
    assert torch.rand(4, device="cuda").tolist() == wanted


class FakeCuda:
    """Stands in for a device: what was read from and written to its generator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state, self.seed = torch.arange(16, dtype=torch.uint8), None
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.get_rng_state", lambda: self.state)
        monkeypatch.setattr("torch.cuda.set_rng_state", lambda state: setattr(self, "state", state))
        monkeypatch.setattr("torch.cuda.manual_seed", lambda seed: setattr(self, "seed", seed))


def test_a_device_state_is_saved_and_set(tmp_path, monkeypatch):
    cuda = FakeCuda(monkeypatch)
    path = write(tmp_path)
    cuda.state = None
    restore_rng(open_checkpoint(path), Topology.single())
    assert torch.equal(cuda.state, torch.arange(16, dtype=torch.uint8))
    assert cuda.seed is None


def test_from_a_host_to_a_device_and_back(tmp_path, monkeypatch, caplog):
    seed_all(5)
    checkpoint = open_checkpoint(write(tmp_path / "host"))
    with monkeypatch.context() as patch:
        cuda = FakeCuda(patch)
        restore_rng(checkpoint, Topology.single())
        assert f"its generator is seeded with {cuda.seed}" in caplog.text
        device = open_checkpoint(write(tmp_path / "device"))
    wanted = draw()
    restore_rng(device, Topology.single())
    assert draw() == wanted
