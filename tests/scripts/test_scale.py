"""`scripts/scale.py`: what it runs, what it judges, what it writes; and a small part of it for real."""

import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path

import layout_runs
import pytest
import scale
import scale_correctness
import torch
from layout_runs import Run, parse_layout, run_command
from peer_runs import peer_job
from scale_correctness import curve_checks, run_correctness, stock_checks
from scale_report import owed, page, picture
from scale_runs import BF16, FP32, STEPS, Bounds, Correctness, correctness_of, fitting, speed_runs
from scale_speed import bubbles, measured

from neox_hf.planning import DEVICES, Job
from tests.runs import tiny_recipe, write_corpus

BOUNDS = Bounds(loss=1e-3, norm=1e-2, stock=1e-3)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def curve(steps: int, loss: float = 2.0, norm: float = 1.0) -> dict:
    return {"loss": [loss] * steps, "grad_norm": [norm] * steps, "seconds": [0.1] * steps}


# What is run.


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_every_curve_fits_its_devices(devices, cuda, tmp_path):
    plan = correctness_of(devices, cuda)
    for layout in (*plan.split, *plan.resumed):
        run = plan.at(layout)
        assert run.world == devices
        assert run.recipe(tmp_path).samples_per_step(devices) == plan.one.samples == 16
        Job.of(run.recipe(tmp_path), devices)  # heads and layers can be dealt
    assert plan.bounds is (BF16 if cuda else FP32)
    assert plan.one.steps > STEPS


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_every_speed_run_fits_its_devices(devices, cuda, tmp_path):
    runs = speed_runs(devices, cuda)
    assert len({run.name for run in runs}) == len(runs)
    for each in runs:
        assert each.run.world in (1, devices)
        Job.of(each.run.recipe(tmp_path), each.run.world)
        assert each.limit <= 600


def test_what_is_owed_is_run():
    names = [run.name for run in speed_runs(8, True)]
    assert names[:3] == ["1.4B data=1", "1.4B data=8", "20B tensor=2,pipeline=4"]
    assert {"20B tensor=4,pipeline=2", "20B tensor=8", "6.9B data=8,zero=1", "6.9B peer zero stage=1"} <= set(names)
    assert "20B peer zero stage=3 recompute=1" in names


def test_pipelines_are_run_with_half_the_work_too():
    shorter = {run.name: run.shorter for run in speed_runs(8, True)}
    assert shorter["20B tensor=2,pipeline=4"].run.samples == 64
    assert shorter["20B tensor=8"] is shorter["6.9B peer zero stage=3"] is None


def test_as_little_is_recomputed_as_fits(tmp_path):
    runs = {run.name: run.run for run in speed_runs(8, True)}
    published = runs["20B tensor=2,pipeline=4"]
    for device, mode in (("H200", "none"), ("H100", "selective")):
        chosen, planned = fitting(published, DEVICES[device], tmp_path)
        assert chosen.settings == (f"train.activation_checkpointing={mode}",)
        assert planned.fits_well
    assert fitting(runs["20B tensor=8"], None, tmp_path) == (runs["20B tensor=8"], None)


def test_a_peer_has_the_same_work(tmp_path):
    run = Run(config=speed_runs(8, True)[1].run.config, layout={}, micro_batch=8, global_batch=512, steps=4)
    job = peer_job(run, 8, tmp_path)
    assert (job["micro_batch"], job["accumulation"], job["seq_length"], job["steps"]) == (8, 8, 2048, 4)
    assert (job["model"]["num_hidden_layers"], job["model"]["vocab_size"]) == (24, 50304)


def test_what_a_layout_recomputes(tmp_path):
    run = Run(config=speed_runs(8, True)[1].run.config, layout={}, micro_batch=8, global_batch=512, steps=4)
    modes = [run.recipe(tmp_path).train.activation_checkpointing]
    run = dataclasses.replace(run, layout=parse_layout("tensor=2,selective"))
    modes.append(run.recipe(tmp_path).train.activation_checkpointing)
    assert modes == [None, "selective"]


def test_a_layout_that_is_none():
    assert parse_layout("tensor=2,sequence") == {"tensor": 2, "sequence": 1}
    with pytest.raises(SystemExit, match="'tenser=2' in 'tenser=2,sequence' is no size or switch of a layout"):
        parse_layout("tenser=2,sequence")
    with pytest.raises(SystemExit, match="'ddp' in 'ddp' is no size or switch"):
        parse_layout("ddp")  # a peer's name


# What is judged.


@pytest.mark.parametrize(
    ("figures", "ok"),
    [
        (curve(6), [True, True]),
        (curve(6, loss=2.0019), [True, True]),
        (curve(6, loss=2.003), [False, True]),
        (curve(6, norm=1.02), [True, False]),
        (curve(6, loss=math.nan), [False, True]),
        (curve(5), [False]),
        ({}, [False]),
    ],
)
def test_bounds_of_a_curve(figures, ok):
    assert [check["ok"] for check in curve_checks("pipeline=2", figures, curve(6), BOUNDS)] == ok


def test_nothing_follows_a_curve_that_is_not_there():
    assert not curve_checks("pipeline=2", curve(6), {}, BOUNDS)[0]["ok"]
    assert not stock_checks(Path("nowhere"), {}, BOUNDS, Path("nowhere"))[0]["ok"]


def test_a_checkpoint_that_does_not_load(tmp_path):
    one = {**curve(STEPS + 1), "recorded": {"input_ids": [[1]], "shift_labels": [[1]]}}
    (tmp_path / "empty").mkdir()
    for name, what in (("missing", "there is no checkpoint"), ("empty", "exit 1")):
        (check,) = stock_checks(tmp_path / name, one, BOUNDS, tmp_path)
        assert (check["ok"], check["what"]) == (False, what)


def test_failed_runs_fail_their_checks_and_others_go_on(tmp_path, monkeypatch, capsys):
    def run_ours(run, folder, timeout, more=()):
        return {} if run.world == 2 else {**curve(run.steps), "recorded": {"input_ids": [], "shift_labels": []}}

    monkeypatch.setattr(scale_correctness, "run_ours", run_ours)
    plan = correctness_of(2, False)
    notes = []
    section = run_correctness(plan, tmp_path, lambda results: notes.append(len(results["checks"])))
    assert [check["name"] for check in section["checks"] if not check["ok"]] == [
        *plan.split,
        "stock transformers",
        *(f"{layout}, resumed" for layout in plan.resumed),
    ]
    assert notes == sorted(notes)
    assert "FAILED: pipeline=2, did not run" in capsys.readouterr().out


def test_what_half_the_micro_batches_tell():
    """Passes of 0.1 s, 4 stages, half a second for the optimizer."""
    whole, half = ({"seconds": [9.0] * 3 + [0.1 * (count + 3) + 0.5] * 4} for count in (32, 16))
    found = bubbles(whole, half, 32, {"pipeline": 4})
    assert found["bubble"] == pytest.approx((0.1 * 3 + 0.5) / 4.0)
    assert found["bubble_computed"] == pytest.approx(3 / 35)
    assert bubbles(whole, {}, 32, {"pipeline": 4}) == {"bubble_computed": pytest.approx(3 / 35)}


# What is written.


def results() -> dict:
    figures = {"peak_gib": 40.0, "reserved_gib": 44.0, "samples": 64, "seconds": [9.0, 9.0, 9.0, 2.0, 2.0]}
    rows = {}
    for each in speed_runs(8, True)[:3]:
        row = measured(each, figures | {"samples": each.run.samples}, each.run.recipe(Path("out")), each.run.world)
        planned = {"tokens_per_second": 1e5, "tflops": 500.0, "peak_gib": 41.0}
        rows[each.name] = row | {"planned": planned, "commit": "abc1234"}
    rows["6.9B data=8,zero=1"] = measured(speed_runs(8, True)[5], {}, None, 8)
    checks = curve_checks("pipeline=2", curve(60), curve(60), BOUNDS) + curve_checks("data=2", {}, curve(60), BOUNDS)
    curves = {"one device": curve(60), "pipeline=2": curve(60, loss=2.001), "data=2, resumed": curve(10), "data=2": {}}
    host = {"device": "H200", "devices": 8, "date": "2026-12-01", "versions": "torch 2"}
    correctness = {"checks": checks, "curves": curves}
    return {"host": host, "commands": ["python scale.py"], "correctness": correctness, "speed": rows}


def test_the_page():
    text = page(results())
    assert "# 8 x H200, 2026-12-01" in text
    assert "| pipeline=2 | loss of 60 steps | 0.0e+00 | 1.0e-03 | yes |" in text
    assert "| data=2 | did not run | - | - | no |" in text
    assert "| loss of step | 1 | 10 | 26 | 50 | 51 | 60 |" in text
    assert "| data=2, resumed | - | - | - | - | 2.000000 | 2.000000 |" in text
    assert "| 1.4B data=1 | 65,536 | 100,000 | 594.7 | 500 | 40.0 | 44.0 | 41.0 | - | - | - | abc1234 |" in text
    assert "| 6.9B data=8,zero=1 | failed |" in text


def test_what_was_owed():
    rows = results()["speed"]
    (lines,) = owed(rows)
    assert "- Pythia-1.4B, data=8 beside one: 8.00 times; owed 7.7: yes." in lines
    assert "- GPT-NeoX-20B tensor=2,pipeline=4: 2099 TFLOP/s a device; owed 480: yes. Published: 117 on" in lines
    rows["20B tensor=2,pipeline=4"]["tflops"] = 479.0
    rows["1.4B data=8"]["tokens_per_second"] /= 2
    assert "479 TFLOP/s a device; owed 480: no." in owed(rows)[0]
    assert "4.00 times; owed 7.7: no." in owed(rows)[0]
    assert owed({}) == []


def test_fewer_devices_than_what_is_owed_is_for():
    rows = {f"1.4B data={n}": {"model": "1.4B", "peer": None, "tokens_per_second": n * 65e3} for n in (1, 4)}
    assert owed(rows) == ["- Pythia-1.4B, data=4 beside one: 4.00 times."]


def test_one_process_has_one_of_the_devices_it_may_see(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert layout_runs._environment(1)["CUDA_VISIBLE_DEVICES"] == "2"
    assert layout_runs._environment(1, card=1)["CUDA_VISIBLE_DEVICES"] == "3"
    assert layout_runs._environment(2)["CUDA_VISIBLE_DEVICES"] == "2,3"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert layout_runs._environment(1)["CUDA_VISIBLE_DEVICES"] == "0"
    assert layout_runs._environment(1, card=1)["CUDA_VISIBLE_DEVICES"] == "1"
    with pytest.raises(SystemExit, match="card=2: this host shows 2 devices, counted from 0"):
        layout_runs._environment(1, card=2)


def test_the_picture(tmp_path):
    picture(results(), tmp_path / "picture.png")
    picture({"host": results()["host"]}, tmp_path / "empty.png")
    assert (tmp_path / "picture.png").stat().st_size > (tmp_path / "empty.png").stat().st_size > 0


# The command.


@pytest.fixture
def sections(monkeypatch):
    """The command without its runs: checks that are found, and a row of speed."""
    checks = [{"name": "pipeline=2", "what": "loss", "found": 0.0, "bound": 1.0, "ok": True}]

    def correctness(plan, folder, note):
        section = {"checks": checks, "curves": {}}
        note(section)
        return section

    def speed(runs, devices, device, folder, note):
        for each in runs:
            note({"name": each.name, "model": each.model, "layout": each.layout, "peer": each.peer})

    monkeypatch.setattr(scale, "run_correctness", correctness)
    monkeypatch.setattr(scale, "run_speed", speed)
    monkeypatch.setattr(scale.torch.cuda, "is_available", lambda: False)
    return checks


def test_calls_add_to_one_report(sections, tmp_path):
    out = ["--devices", "2", "--out", str(tmp_path)]
    assert scale.main([*out, "--sections", "correctness"]) == 0
    assert scale.main([*out, "--sections", "speed", "--no-peers"]) == 0
    written = json.loads((tmp_path / "scale_cpu_x2.json").read_text())
    assert written["correctness"]["checks"] == sections
    assert written["correctness"]["commit"] == written["speed"]["tiny data=1"]["commit"] == scale.commit()
    assert list(written["speed"]) == [f"tiny {layout}" for layout in
                                      ("data=1", "data=2", "tensor=2", "pipeline=2", "data=2,zero=1")]  # fmt: skip
    assert len(written["commands"]) == 2
    assert "## Correctness" in (tmp_path / "scale_cpu_x2.md").read_text()
    assert (tmp_path / "scale_cpu_x2.png").exists()


def test_rows_by_their_names(sections, tmp_path):
    out = ["--devices", "2", "--sections", "speed", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="--only 20B tensor=3: no row of 2 devices; there are 'tiny data=1', "):
        scale.main([*out, "--only", "20B", "tensor=3"])
    assert not (tmp_path / "out").exists()
    assert scale.main([*out, "--only", "pipeline", "peer ddp"]) == 0
    written = json.loads((tmp_path / "out" / "scale_cpu_x2.json").read_text())
    assert list(written["speed"]) == ["tiny pipeline=2", "tiny peer ddp"]


def test_a_broken_bound_is_an_exit_code(sections, tmp_path):
    sections.append({"name": "tensor=2", "what": "loss", "found": 2.0, "bound": 1.0, "ok": False})
    assert scale.main(["--devices", "2", "--out", str(tmp_path)]) == 1


def test_too_few_devices(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scale.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(scale.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(scale.torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert scale.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().out == "--devices 8: this host has 4 x NVIDIA H200\n"
    assert not (tmp_path / "out").exists()


def test_devices_that_planning_does_not_know(monkeypatch, capsys):
    monkeypatch.setattr(scale.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(scale.torch.cuda, "get_device_name", lambda: "NVIDIA B300")
    assert scale.known_device() is None
    assert "nothing is planned: device 'NVIDIA B300' is unknown" in capsys.readouterr().out


# Processes.


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    child = "import os, time, pathlib; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    parent = f"import os; os.chdir({str(tmp_path)!r}); {parent}"
    code, output = run_command([sys.executable, "-c", parent], os.environ, timeout=2)
    assert code == 124
    assert output == "begun\n\nstopped after 2 s"
    wait_for_death(int((tmp_path / "pid").read_text()))


def wait_for_death(pid: int) -> None:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # dead; whoever inherits it has not looked yet
            return
        time.sleep(0.05)
    pytest.fail(f"{pid} is still there")


def test_a_failed_launch_says_why(tmp_path, capsys):
    assert layout_runs.launch(1, ["-c", "raise SystemExit('no such luck')"], tmp_path / "result.json") == {}
    assert "no such luck" in capsys.readouterr().out


def few_steps(tmp_path: Path, split: list[str], resumed: list[str]) -> Correctness:
    recipe = tiny_recipe(write_corpus(tmp_path / "corpus.jsonl"), tmp_path / "elsewhere")
    recipe["train"] |= {"learning_rate": 1e-3}
    del recipe["train"]["gradient_accumulation_steps"]
    (tmp_path / "tiny.json").write_text(json.dumps(recipe))
    settings = ["model.hidden_dropout=0"]
    one = Run(
        config=[str(tmp_path / "tiny.json")], layout={}, micro_batch=1, global_batch=4, steps=3, settings=settings
    )
    return Correctness(one, split, resumed, FP32)


@pytest.mark.slow
def test_two_ranks_follow_one_and_stock_transformers_loads_what_they_save(tmp_path, monkeypatch):
    monkeypatch.setattr(scale_correctness, "STEPS", 2)
    section = run_correctness(few_steps(tmp_path, ["data=2"], []), tmp_path, lambda results: None)
    assert [(check["name"], check["ok"]) for check in section["checks"]] == [
        ("data=2", True),
        ("data=2", True),
        ("stock transformers", True),
    ]
    assert len(section["curves"]["data=2"]["loss"]) == 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_eight_ranks(tmp_path):
    """The whole section, as `scale.py` runs it without a GPU."""
    section = run_correctness(correctness_of(8, False), tmp_path, lambda results: None)
    assert [check for check in section["checks"] if not check["ok"]] == []
    assert len(section["checks"]) == 7
    assert all(len(curve["loss"]) in (10, 60) for curve in section["curves"].values())
