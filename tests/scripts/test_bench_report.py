"""The benchmark's command line, and what it writes: JSON, tables, a picture."""

import importlib.metadata
import json

import pytest
import torch
import transformers

from neox_hf import kernels
from scripts.bench import report
from scripts.bench.__main__ import NO_DEVICE, describe_run, main, parse, run
from scripts.bench.chart import draw
from tests.scripts.bench_cases import TINY, document, step

CPU = torch.device("cpu")
PNG = b"\x89PNG\r\n"


def rows_of(text, heading):
    """Cells of the table under a heading, by the first of each row."""
    part = text.split(heading, 1)[1].split("\n\n#", 1)[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


def test_tables():
    text = report.markdown(document(), "bench.png")
    assert "2026-11-22, a card, torch 2" in text
    assert "(bench.png)" in text
    steps = rows_of(text, "### 1.4b, micro-batch 8 x 2048 tokens, a device of 625 TFLOP/s")
    ours = steps["ours-bf16"]
    assert (ours["tokens/s"], ours["owed"], ours["MFU"]) == ("66,000", "66,500", "80.0%")
    assert (ours["/ eager"], ours["/ compile"], ours["/ tuned"]) == ("1.375", "", "1.100")
    assert steps["tuned-bf16"]["ms"] == "liger-kernel is not installed"
    gelu = rows_of(text, "## Ops")["GELU"]
    assert (gelu["torch"], gelu["ours"], gelu["floor"], gelu["target"]) == (
        "0.171 / 0.400",
        "0.130 / 0.330",
        "0.125 / 0.313",
        "0.138 / 0.345",
    )
    assert (gelu["compile"], gelu["liger"]) == ("-", "liger-kernel is not installed")
    assert gelu["GiB"] == "0.50, owed 0.6"
    assert rows_of(text, "## Accuracy")["rotary"]["no further"] == "**no**"
    assert "Its device gave 4,284 GB/s for a copy of 4 GiB, read and written, 675 TFLOP/s for bf16 products" in text


def test_every_row_of_a_table_is_as_wide_as_its_head():
    for block in report.markdown(document(), "x.png").split("\n\n"):
        widths = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(widths) <= 1, block


def test_an_empty_document_has_no_tables():
    assert report.markdown(report.empty(), None) == "# Kernels and training step on one device\n"


def test_later_runs_replace_what_they_measured_again():
    later = report.empty()
    later["runs"] = [{"date": "2026-11-23"}]
    later["ops"]["rows"] = [{"op": "GELU", "by": "ours", "both_ms": 0.32}]
    later["steps"] = {"160m": {"ours-bf16": step(5e5)}}
    whole = report.merged([document(), later])
    assert [row["by"] for row in whole["ops"]["rows"]] == ["ours", "torch", "liger"]
    assert whole["ops"]["rows"][0]["both_ms"] == 0.32
    assert list(whole["steps"]) == ["1.4b", "160m"]
    assert [run["date"] for run in whole["runs"]] == ["2026-11-22", "2026-11-23"]
    assert report.merged([whole, whole]) == whole


def test_json_is_whole(tmp_path):
    path = tmp_path / "bench.json"
    report.write_json(document(), path)
    assert report.read_json(path) == document()
    assert [entry.name for entry in tmp_path.iterdir()] == ["bench.json"]


def test_picture(tmp_path):
    assert draw(document(), tmp_path / "all.png")
    assert (tmp_path / "all.png").read_bytes().startswith(PNG)
    for nothing in (report.empty(), report.empty() | {"steps": {"1.4b": {"ours-bf16": {"failed": "out of memory"}}}}):
        assert not draw(nothing, tmp_path / "none.png")
        assert not (tmp_path / "none.png").exists()
        assert ".png" not in report.markdown(nothing, None)


def test_what_no_one_measured_is_not_told():
    unknown = step(66_000)
    del unknown["mfu"]
    text = report.markdown(report.empty() | {"steps": {"1.4b": {"ours-bf16": unknown}}}, None)
    assert rows_of(text, "### 1.4b, micro-batch 8 x 2048 tokens\n")["ours-bf16"]["MFU"] == ""


def test_defaults_are_the_whole_benchmark():
    options = parse([])
    assert options.sections == ["ceilings", "accuracy", "ops", "steps"]
    assert options.sizes == ["160m", "410m", "1.4b", "6.9b"]
    assert (options.variants, options.seconds, options.out.as_posix()) == (None, 300.0, "docs/measurements")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sections", "all"], "invalid choice: 'all'"),
        (["--sizes", "12b"], "invalid choice: '12b'"),
        (["--variants", "fast-bf16"], "variant 'fast-bf16' is unknown"),
        (["--ops", "GELU", "gelu"], "--ops 'gelu': no op has that in its name; there are 'layer norm', "),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_without_cuda_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--out", str(tmp_path)]) == NO_DEVICE == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_reports_of_several_runs_become_one_without_a_device(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    report.write_json(document(), tmp_path / "first.json")
    second = report.empty() | {"steps": {"160m": {"ours-bf16": step(5e5)}}}
    report.write_json(second, tmp_path / "second.json")
    sources = [str(tmp_path / name) for name in ("first.json", "second.json")]
    for more, name in (([], "bench_a_card"), (["--name", "whole"], "whole")):
        assert main(["--sections", "--from", *sources, "--out", str(tmp_path / name), *more]) == 0
        assert {path.name for path in (tmp_path / name).iterdir()} == {f"{name}.{end}" for end in ("json", "md", "png")}
        assert report.read_json(tmp_path / name / f"{name}.json") == report.merged([document(), second])


def options_for(tmp_path, *arguments):
    options = parse([*arguments, "--out", str(tmp_path), "--implementations", "ours", "torch", "--name", "small"])
    options.shapes = options.checked_shapes = TINY
    options.optimizer_size = "tiny"
    return options


def test_a_run_names_the_packages_that_change_its_figures(monkeypatch):
    def version(package):
        if package != "quack-kernels":
            raise importlib.metadata.PackageNotFoundError
        return "0.6.5"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = describe_run(CPU, "python -m scripts.bench")
    always = f"torch {torch.__version__}, transformers {transformers.__version__}"
    assert found["versions"] == f"{always}, quack-kernels 0.6.5"
    assert found["command"] == "python -m scripts.bench"


def test_a_run_of_ops(tmp_path, capsys):
    options = options_for(tmp_path, "--sections", "accuracy", "ops", "--ops", "GELU")
    found = run(options, CPU, "the command")
    names = {"GELU", "bias + GELU", "bias + GELU, tanh", "linear + bias + GELU"}
    assert {row["op"] for row in found["accuracy"]} == names
    assert {row["dtype"] for row in found["accuracy"]} == {"bfloat16", "float16", "float32"}
    assert {(row["op"], row["by"]) for row in found["ops"]["rows"]} == {
        (op, by) for op in names for by in ("ours", "torch")
    }
    assert json.loads((tmp_path / "small.json").read_text()) == found
    assert "the command" in (tmp_path / "small.md").read_text()
    assert (tmp_path / "small.png").read_bytes().startswith(PNG)
    assert "bias + GELU, ours: " in capsys.readouterr().out


def test_an_op_that_fails_is_a_row_and_no_end(tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise torch.OutOfMemoryError("a | b")

    monkeypatch.setattr(kernels, "bias_gelu", fails)
    monkeypatch.setattr("scripts.bench.optimizer_ops.State", fails)
    options = options_for(tmp_path, "--sections", "accuracy", "ops", "--ops", "bias + GELU", "AdamW")
    found = run(options, CPU, "x")
    reason = "OutOfMemoryError: a | b"
    failed = {(row["op"], row["dtype"]) for row in found["accuracy"] if row.get("failed") == reason}
    dtypes = ("bfloat16", "float16", "float32")
    gelus = {(op, dtype) for op in ("bias + GELU", "bias + GELU, tanh") for dtype in dtypes}
    assert failed == gelus | {("AdamW", "bfloat16"), ("AdamW", "float32")}
    assert {row["by"] for row in found["ops"]["rows"] if row["op"] == "bias + GELU" and "failed" in row} == {"ours"}
    optimizer = [row for row in found["ops"]["rows"] if row["op"].startswith(("AdamW", "gradient norm", "cast"))]
    assert {row["failed"] for row in optimizer} == {reason}
    assert len(optimizer) == 10
    printed, page = capsys.readouterr().out, (tmp_path / "small.md").read_text()
    assert f"bias + GELU float16: {reason}" in printed
    assert f"bias + GELU, ours: {reason}" in printed
    assert "| AdamW | float32 |  | OutOfMemoryError: a / b | **no** |" in page


def test_time_that_is_over_measures_nothing_more(tmp_path, capsys):
    found = run(options_for(tmp_path, "--sections", "ops", "--seconds", "-1"), CPU, "x")
    assert found["ops"]["rows"] == []
    assert "no time is left" in capsys.readouterr().out


def test_a_run_that_breaks_keeps_what_it_had(tmp_path, monkeypatch):
    options = options_for(tmp_path, "--sections", "ops", "steps", "--ops", "layer norm", "--sizes", "tiny")

    def breaks(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("scripts.bench.__main__.measure_size", breaks)
    with pytest.raises(KeyboardInterrupt):
        run(options, CPU, "x")
    assert len(report.read_json(tmp_path / "small.json")["ops"]["rows"]) == 6
    assert "| layer norm |" in (tmp_path / "small.md").read_text()


def test_a_run_of_steps_reports_each_turn(tmp_path, monkeypatch):
    options = options_for(tmp_path, "--sections", "steps", "--sizes", "tiny", "--variants", "ours-bf16", "eager-amp")
    seen = []

    def measured(size, variants, plan, keep):
        turn = {"step_ms": [100.0], "peak_gib": 1.0, "loss": 1.0}
        figures = {variant: {"turns": [turn]} for variant in variants}
        keep(figures)
        seen.append(report.read_json(tmp_path / "small.json")["steps"]["tiny"]["eager-amp"]["ms"])
        assert plan.seconds == 300.0
        return figures

    monkeypatch.setattr("scripts.bench.__main__.measure_size", measured)
    found = run(options, CPU, "x")
    assert seen == [100.0]
    assert found["steps"]["tiny"]["ours-bf16"]["tokens_s"] == pytest.approx(640)
