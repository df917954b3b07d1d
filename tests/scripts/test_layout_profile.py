"""What is made of the profile of a layout's step."""

import json

import bench_layouts
import layout_profile
import pytest
import torch
from layout_profile import Launch, by_kernel, by_stream, gaps, text

from tests.runs import tiny_recipe, write_corpus

FOUND = [
    Launch(0, 300, 7, "product"),
    Launch(250, 400, 9, "copy"),
    Launch(302, 500, 7, "product"),
    Launch(600, 900, 7, "sum"),
    Launch(650, 700, 7, "within"),
    Launch(905, 1000, 7, "product"),
]


def test_streams_and_kernels_are_added_up():
    assert by_stream(FOUND) == {7: 300 + 198 + 300 + 50 + 95, 9: 150}
    assert by_kernel(FOUND) == [
        (7, "product", 593, 3), (7, "sum", 300, 1), (9, "copy", 150, 1), (7, "within", 50, 1)
    ]  # fmt: skip


def test_gaps_are_between_what_ends_last_and_what_comes_next():
    assert gaps([launch for launch in FOUND if launch.stream == 7]) == [
        ("product", "sum", 100, 1),
        ("sum", "product", 5, 1),
    ]


def test_the_text():
    first, pool, *lines = text(FOUND, ["pool (0, 0): 3 segments"]).splitlines()
    assert first == "1.0 ms; by stream: 7: 0.9, 9: 0.1; stream 7 idles 0.1"
    assert pool == "pool (0, 0): 3 segments"
    assert lines[0].split() == ["0.593", "ms", "3", "x", "197.7", "us", "7", "product"]
    assert lines[4] == "stream 7 waits:"
    assert lines[5].split() == ["0.100", "ms", "1", "x", "product", "->", "sum"]


def test_pools_are_told_apart(monkeypatch):
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 2**30, "allocated_size": 2**29},
        {"segment_pool_id": (0, 1), "total_size": 2**30, "allocated_size": 0},
        {"segment_pool_id": (0, 0), "total_size": 2**30, "allocated_size": 0},
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert layout_profile.pools() == [
        "pool (0, 0): 2 segments, 2.00 GiB held, 0.50 by tensors",
        "pool (0, 1): 1 segments, 1.00 GiB held, 0.00 by tensors",
    ]


@pytest.mark.slow
def test_ranks_write_what_they_did(tmp_path, monkeypatch, capsys):
    recipe = tiny_recipe(write_corpus(tmp_path / "corpus.jsonl"), tmp_path / "elsewhere")
    del recipe["train"]["gradient_accumulation_steps"]
    (tmp_path / "tiny.json").write_text(json.dumps(recipe))
    command = ["bench_layouts.py", "--config", str(tmp_path / "tiny.json"), "--micro-batch", "1", "--global-batch", "2"]
    command += ["--steps", "2", "--warmup", "1", "--layouts", "data=1", "data=2", "--profile", str(tmp_path / "found")]
    monkeypatch.setattr("sys.argv", command)
    bench_layouts.main()
    assert "| data=2 |" in capsys.readouterr().out
    written = sorted(path.name for path in (tmp_path / "found").iterdir())
    assert written == ["data=1.rank0.txt", "data=2.rank0.txt", "data=2.rank1.txt"]
    assert "aten::" in (tmp_path / "found" / written[0]).read_text()
