"""The correctness section of `scale.py`: split layouts follow one device's curve, checkpoints resume at others and load
in stock transformers.

Every curve has the same seed and samples. Each check is a dict: `name`, `what`, `found` (a relative difference, or None
where nothing could be compared), `bound`, `ok`.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from layout_runs import Figures, Run, largest_difference, run_command, run_ours
from scale_runs import MORE_STEPS, STEPS, Bounds, Correctness

STOCK_LOSS = Path(__file__).with_name("stock_loss.py")
CURVE_SECONDS, STOCK_SECONDS = 600, 300
CURVES = {"loss": "loss", "grad_norm": "gradient norm"}

Checks = list[dict[str, Any]]
Note = Callable[[dict[str, Any]], None]


def run_correctness(plan: Correctness, folder: Path, note: Note) -> dict[str, Any]:
    """Everything, one after the other; `note` is told what is known after each run. A run that fails fails its checks,
    and the others go on."""
    section = Section(plan, folder, note)
    one = section.train("one device", plan.one, more=["--samples-of-step", str(STEPS)])
    section.add([] if one else [failed("one device")])
    for layout in plan.split:
        saves = [f"train.save_schedule=[{STEPS}]"] if layout == plan.split[0] else []
        figures = section.train(layout, plan.at(layout), *saves)
        section.add(curve_checks(layout, figures, one, plan.bounds))
    saved = place(folder, plan.split[0]) / f"checkpoint-{STEPS}"
    section.add(stock_checks(saved, one, plan.bounds, folder))
    for layout in plan.resumed:
        name = f"{layout}, resumed"
        figures = section.train(name, plan.at(layout), f"train.resume_from_checkpoint={saved}")
        section.add(curve_checks(name, figures, after_checkpoint(one), plan.bounds))
    if plan.yardstick:
        section.train(f"one device, {', '.join(plan.yardstick)}", plan.one, *plan.yardstick)
        section.add([])
    return section.results


class Section:
    """What is known so far: `curves` by name, `checks`, `bounds`."""

    def __init__(self, plan: Correctness, folder: Path, note: Note) -> None:
        self.results: dict[str, Any] = {"curves": {}, "checks": [], "bounds": vars(plan.bounds)}
        self._folder, self._note = folder, note

    def train(self, name: str, run: Run, *settings: str, more: Sequence[str] = ()) -> Figures:
        """The steps that this run took: a resumed one's log begins with those before it."""
        print(f"curve: {name}", flush=True)
        output = place(self._folder, name)
        hand_on_tokenizer(place(self._folder, "one device"), output)
        run = replace(run, settings=(*run.settings, f"train.output_dir={output}", *settings))
        figures = run_ours(run, self._folder, CURVE_SECONDS, more)
        taken = {key: figures[key][-len(figures["seconds"]) :] for key in CURVES} if figures else {}
        self.results["curves"][name] = taken
        return {**figures, **taken}

    def add(self, checks: Checks) -> None:
        for check in checks:
            print(f"  {in_words(check)}", flush=True)
        self.results["checks"] += checks
        self._note(self.results)


def place(folder: Path, name: str) -> Path:
    """Where a curve writes. Overrides are YAML: no comma, no blank."""
    return folder / "".join(letter if letter.isalnum() else "-" for letter in name)


def hand_on_tokenizer(source: Path, target: Path) -> None:
    """What one run has trained, the next would train again."""
    if (source / "tokenizer").exists() and not (target / "tokenizer").exists():
        shutil.copytree(source / "tokenizer", target / "tokenizer")


def after_checkpoint(figures: Figures) -> Figures:
    """The steps behind the checkpoint."""
    return {key: figures[key][-MORE_STEPS:] for key in CURVES} if figures else {}


def curve_checks(name: str, figures: Figures, one: Figures, bounds: Bounds) -> Checks:
    """Whether loss and gradient norm of every step are those of one device.

    figures: of the steps that this process ran. One that had not resumed would have run others, and more of them.
    """
    if not figures or not one:
        return [failed(name)]
    steps = len(one["loss"])
    if any(len(figures[key]) != len(one[key]) for key in CURVES):
        return [failed(name, f"{len(figures['loss'])} steps instead of {steps}")]
    limits = {"loss": bounds.loss, "grad_norm": bounds.norm}
    return [
        judged(name, f"{words} of {steps} steps", largest_difference(figures, one, key), limits[key])
        for key, words in CURVES.items()
    ]


def stock_checks(checkpoint: Path, one: Figures, bounds: Bounds, folder: Path) -> Checks:
    """Whether stock transformers, loading the checkpoint, finds the loss that the next step of one device had."""
    name, what = "stock transformers", f"loss of step {STEPS + 1} by the checkpoint"
    if not one:
        return [failed(name)]
    if not checkpoint.exists():
        return [failed(name, "there is no checkpoint")]
    samples, result = folder / "samples.json", folder / "stock.json"
    samples.write_text(json.dumps(one["recorded"]))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(STOCK_LOSS), str(checkpoint), str(samples), str(result)]
    code, output = run_command(command, environment, STOCK_SECONDS)
    if code:
        print(output[-3000:], flush=True)
        return [failed(name, f"exit {code}")]
    theirs, ours = json.loads(result.read_text())["loss"], one["loss"][STEPS]
    return [judged(name, f"{what}: {theirs:.6f} for {ours:.6f}", abs(theirs - ours) / abs(ours), bounds.stock)]


def judged(name: str, what: str, found: float, bound: float) -> dict[str, Any]:
    # A NaN is within no bound.
    return {"name": name, "what": what, "found": found, "bound": bound, "ok": bool(found <= bound)}


def failed(name: str, what: str = "did not run") -> dict[str, Any]:
    return {"name": name, "what": what, "found": None, "bound": None, "ok": False}


def in_words(check: dict[str, Any]) -> str:
    verdict = "ok" if check["ok"] else "FAILED"
    difference = "" if check["found"] is None else f" differs by {check['found']:.1e}, at most {check['bound']:.0e}"
    return f"{verdict}: {check['name']}, {check['what']}{difference}"
