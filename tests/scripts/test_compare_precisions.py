"""`scripts/compare_precisions.py` trains one recipe twice and tells how far apart the curves are."""

import json

import pytest

from scripts import compare_precisions
from tests.runs import tiny_recipe, write_corpus


def test_curves_and_what_is_held_out(tmp_path, monkeypatch, capsys):
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_recipe(corpus, tmp_path / "elsewhere")))
    figures = tmp_path / "figures.json"
    options = ["--config", str(tmp_path / "tiny.json"), "--steps", "4", "--window", "2", "--json", str(figures)]
    monkeypatch.setattr("sys.argv", ["compare_precisions.py", *options, "--set", "model.hidden_dropout=0"])
    compare_precisions.main()
    written = json.loads(figures.read_text())
    half, eight = written["losses"]["bf16"], written["losses"]["fp8"]
    assert len(half) == len(eight) == 4
    assert half != eight == pytest.approx(half, rel=1e-2)
    printed = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split()[0] for line in printed] == ["steps", "1-2", "3-4", "held", "fp8:"]
    mean = sum(half[:2]) / 2, sum(eight[:2]) / 2
    assert printed[1].split() == ["1-2", f"{mean[0]:.4f}", f"{mean[1]:.4f}", f"{mean[1] / mean[0] - 1:+.3%}"]
    assert not (tmp_path / "elsewhere").exists()


def test_the_stock_class_follows(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_recipe(corpus, tmp_path / "elsewhere")))
    figures = tmp_path / "figures.json"
    options = ["--config", str(tmp_path / "tiny.json"), "--steps", "4", "--window", "2", "--json", str(figures)]
    runs = ["--precisions", "stock:fp32", "fp32", "--set", "model.hidden_dropout=0"]
    monkeypatch.setattr("sys.argv", ["compare_precisions.py", *options, *runs])
    compare_precisions.main()
    written = json.loads(figures.read_text())
    for curves in (written["losses"], written["norms"]):
        assert len(curves["fp32"]) == 4
        assert curves["fp32"] == pytest.approx(curves["stock:fp32"], rel=1e-5)
