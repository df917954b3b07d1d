"""Several devices of one host: does every layout train as one device does, and how fast is each.

    python scripts/scale.py                                            # eight devices, both sections
    python scripts/scale.py --devices 4                                # or 2: what fits there of either section
    python scripts/scale.py --sections speed --only 20B "1.4B peer"    # adds to what an earlier call has written

correctness: tensor 2 x pipeline 2 x data 2 with sequence parallelism follows one device's curve; its checkpoint resumes
at tensor 4 x data 2 and at pipeline 8, and loads in stock transformers. speed: tokens/s, TFLOP/s, memory and bubble of
layouts of Pythia-1.4B, 6.9B and GPT-NeoX-20B, beside what was planned and beside stock models under DDP and DeepSpeed.

Everything is written as it is measured, into `scale_DEVICE_xN.json`, `.md` and `.png`. Exit code 1: a layout differs by
more than its bound, or a curve did not run; 2: the host has fewer devices. Without CUDA ranks are processes over gloo,
and the models tiny.
"""

import argparse
import importlib.metadata
import json
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from scale_correctness import run_correctness
from scale_report import page, picture
from scale_runs import DEVICES, SpeedRun, correctness_of, speed_runs
from scale_speed import run_speed

from neox_hf.errors import RecipeError
from neox_hf.planning import Device, device_called

SECTIONS = ("correctness", "speed")
OUT = Path("docs/measurements")
PACKAGES = ("torch", "triton", "transformers", "accelerate", "deepspeed")
MISSING_DEVICES = 2


class Report:
    """The files of this device and number, with what earlier calls have found for the same host."""

    def __init__(self, out: Path, devices: int, arguments: Sequence[str]) -> None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        name = re.sub(r"[^a-z0-9]+", "_", device.lower().removeprefix("nvidia ")).strip("_")
        self.path = out / f"scale_{name}_x{devices}.json"
        out.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        date = datetime.now(UTC).date().isoformat()
        self.results["host"] = {"device": device, "devices": devices, "date": date, "versions": versions()}
        self.results.setdefault("commands", []).append(shlex.join(["python", "scripts/scale.py", *arguments]))
        self.commit = commit()

    def add_correctness(self, section: dict[str, Any]) -> None:
        self.results["correctness"] = {**section, "commit": self.commit}
        self.write()

    def add_speed(self, row: dict[str, Any]) -> None:
        self.results.setdefault("speed", {})[row["name"]] = {**row, "commit": self.commit}
        self.write()

    def write(self) -> None:
        self.path.write_text(json.dumps(self.results, indent=1))
        self.path.with_suffix(".md").write_text(page(self.results))
        picture(self.results, self.path.with_suffix(".png"))


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue  # triton, on a host without CUDA
    return ", ".join(found)


def commit() -> str | None:
    """Of the repository, where there is one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def known_device() -> Device | None:
    """This host's, if planning knows it."""
    if not torch.cuda.is_available():
        return None
    try:
        return device_called(torch.cuda.get_device_name())
    except RecipeError as error:
        print(f"nothing is planned: {error}", flush=True)
        return None


def missing(devices: int) -> str | None:
    """Why this host cannot run on so many devices."""
    if not torch.cuda.is_available() or torch.cuda.device_count() >= devices:
        return None
    return f"--devices {devices}: this host has {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", type=int, choices=DEVICES, default=max(DEVICES))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="rows of the speed section in whose names one of these is"
    )
    parser.add_argument("--no-peers", action="store_true", help="our own rows of the speed section alone")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args(arguments)


def wanted_runs(options: argparse.Namespace, cuda: bool) -> list[SpeedRun]:
    """Rows of the speed section.

    Raises:
        SystemExit: there are none.
    """
    if "speed" not in options.sections:
        return []
    every = speed_runs(options.devices, cuda)
    mine = [run for run in every if not (options.no_peers and run.peer)]
    found = [run for run in mine if not options.only or any(text in run.name for text in options.only)]
    if not found:
        names = ", ".join(repr(run.name) for run in mine)
        raise SystemExit(f"--only {shlex.join(options.only)}: no row of {options.devices} devices; there are {names}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if reason := missing(options.devices):
        print(reason, flush=True)
        return MISSING_DEVICES
    cuda, ok = torch.cuda.is_available(), True
    runs = wanted_runs(options, cuda)
    report = Report(options.out, options.devices, arguments)
    with tempfile.TemporaryDirectory() as folder:
        if "correctness" in options.sections:
            section = run_correctness(correctness_of(options.devices, cuda), Path(folder), report.add_correctness)
            ok = all(check["ok"] for check in section["checks"])
        if runs:
            run_speed(runs, options.devices, known_device(), Path(folder), report.add_speed)
    print(page(report.results), flush=True)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
