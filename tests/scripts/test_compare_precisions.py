"""`scripts/compare_precisions.py` trains one recipe twice and tells how far apart the curves are."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from scripts import compare_precisions
from tests.gloo import run_ranks
from tests.runs import tiny_recipe, write_corpus


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    """Four steps of the tiny recipe, their figures in `figures.json`."""
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_recipe(corpus, tmp_path / "elsewhere")))
    files = ["--config", str(tmp_path / "tiny.json"), "--json", str(tmp_path / "figures.json")]
    return [*files, "--steps", "4", "--window", "2"]


def compare(rank: int, arguments: list[str], *settings: str) -> None:
    sys.argv = ["compare_precisions.py", *arguments, "--set", "model.hidden_dropout=0", *settings]
    compare_precisions.main()


def figures(folder: Path) -> dict:
    return json.loads((folder / "figures.json").read_text())


def test_curves_and_what_is_held_out(tmp_path, arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", sys.argv)
    compare(0, arguments)
    written = figures(tmp_path)
    half, eight = written["losses"]["bf16"], written["losses"]["fp8"]
    assert len(half) == len(eight) == 4
    assert half != eight == pytest.approx(half, rel=1e-2)
    printed = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split()[0] for line in printed] == ["steps", "1-2", "3-4", "held", "fp8:"]
    mean = sum(half[:2]) / 2, sum(eight[:2]) / 2
    assert printed[1].split() == ["1-2", f"{mean[0]:.4f}", f"{mean[1]:.4f}", f"{mean[1] / mean[0] - 1:+.3%}"]
    assert f"the mean loss is {sum(eight) / sum(half) - 1:+.3%} from that of bf16" in printed[-1]
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_the_stock_class_follows(tmp_path, arguments, zero_stage):
    """In a DeepSpeed engine too: fp16 has no other."""
    precisions = ["--precisions", "stock:fp32", "fp32", "torch:fp32"]
    run_ranks(compare, 1, [*arguments, *precisions], f"parallel.zero_stage={zero_stage}")
    written = figures(tmp_path)
    for curves in (written["losses"], written["norms"]):
        assert len(curves["fp32"]) == 4
        for ours in ("fp32", "torch:fp32"):
            assert curves[ours] == pytest.approx(curves["stock:fp32"], rel=1e-5)


def test_what_a_name_says():
    options = argparse.Namespace(set=["model.kernels=auto"], steps=1)
    said = {
        name: compare_precisions.overrides(options, name, Path("out")) for name in ("bf16", "stock:bf16", "torch:bf16")
    }
    assert all("train.precision=bf16" in overrides for overrides in said.values())
    assert [name for name, overrides in said.items() if "model.kernels=torch" in overrides] == ["torch:bf16"]
    assert said["torch:bf16"].index("model.kernels=torch") > said["torch:bf16"].index("model.kernels=auto")
