"""Accuracy and time of every kernel, and the training step beside its peers, on one CUDA device.

    python -m scripts.bench                                              # all of it: `make bench`
    python -m scripts.bench --sections ops --implementations ours torch --seconds 60
    python -m scripts.bench --sections steps --sizes 1.4b --variants ours-bf16 tuned-amp
    python -m scripts.bench --sections --from first.json second.json     # one report of several runs

What is written grows as it is measured, so a run that is cut has given what it had.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from scripts.bench import report
from scripts.bench.case import Case
from scripts.bench.cases import CASES
from scripts.bench.ceilings import measure_ceilings
from scripts.bench.chart import draw
from scripts.bench.floors import Shapes
from scripts.bench.measure_ops import bounds, check_accuracy, clear, time_case
from scripts.bench.optimizer_ops import check_adamw, optimizer_bounds, parameter_shapes, time_optimizer
from scripts.bench.rounds import Plan, measure_size
from scripts.bench.sizes import MEASURED, SIZES
from scripts.bench.summary import summarise
from scripts.bench.turns import TurnLength
from scripts.bench.variants import parse_variant

NO_DEVICE = 2
"""Exit status where there is no CUDA device."""

IMPLEMENTATIONS = ("ours", "torch", "liger", "compile")
CHANGES_FIGURES = ("triton", "liger-kernel", "flash-attn-4", "quack-kernels")
"""Packages that a run tells of where they are installed."""

ADAMW = "AdamW and gradient norm"
UPDATED = (torch.bfloat16, torch.float32)
"""Parameters that AdamW updates: under fp16 they are DeepSpeed's, in fp32."""

CHECKED_SHAPES = Shapes(batch=1)
CHECKED_PARAMETERS = [torch.Size(shape) for shape in ((4096, 1024), (1023, 77), (2048,), (1,))]


class Bench:
    """A document under way, and where it is written."""

    def __init__(self, options: argparse.Namespace, device: torch.device, command: str) -> None:
        self.options, self.device = options, device
        self.document = report.merged([report.read_json(path) for path in options.sources])
        runs = self.document["runs"]
        if options.sections:
            runs.append(describe_run(device, command))
        name = (runs[-1]["device"] if runs else device_name(device)).lower().replace(" ", "_")
        self.path = options.out / f"{options.name or f'bench_{name}'}.json"

    def write(self, *, whole: bool = False) -> None:
        """The document; with its tables and the picture, which take a second, if `whole`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        report.write_json(self.document, self.path)
        if whole:
            picture = self.path.with_suffix(".png")
            name = picture.name if draw(self.document, picture) else None
            self.path.with_suffix(".md").write_text(report.markdown(self.document, name), encoding="utf-8")

    def add(self, part: report.Document) -> None:
        self.document = report.merged([self.document, {**report.empty(), **part}])
        self.write()

    def cases(self) -> list[Case]:
        return [case for case in CASES if wanted(case.name, self.options.ops)]

    def ceilings(self) -> None:
        found = self.document["runs"][-1]["ceilings"] = measure_ceilings(self.device)
        self.write()
        clear(self.device)
        print({name: round(value) for name, value in found.items()}, flush=True)

    def accuracy(self) -> None:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            checks: list[Callable[[], report.Document]] = [
                lambda case=case, dtype=dtype: check_accuracy(case, self.options.checked_shapes, self.device, dtype)
                for case in self.cases()
                if case.checked
            ]
            if wanted(ADAMW, self.options.ops) and dtype in UPDATED:
                checks.append(lambda dtype=dtype: check_adamw(CHECKED_PARAMETERS, self.device, dtype))
            for check in checks:
                row = check()
                errors = row.get("failed") or f"torch {row['torch']:.2e}, ours {row['ours']:.2e}"
                print(f"{row['op']} {row['dtype']}: {errors}", flush=True)
                self.add({"accuracy": [row]})

    def ops(self) -> None:
        """What compiles comes last: of a run that is cut short, most is then there."""
        end, shapes = time.perf_counter() + self.options.seconds, self.options.shapes
        self.add({"ops": {"bounds": [bounds(case, shapes) for case in self.cases()], "rows": []}})
        compiled = ["compile"] if "compile" in self.options.implementations else []
        others = [name for name in self.options.implementations if name != "compile"]
        self._time_cases(others, end)
        if wanted(ADAMW, self.options.ops) and time.perf_counter() < end:
            parameters = parameter_shapes(SIZES[self.options.optimizer_size].config())
            self.add({"ops": {"bounds": list(optimizer_bounds(parameters)), "rows": []}})
            for row in time_optimizer(parameters, self.device):
                self._add_row(row)
        self._time_cases(compiled, end)

    def _time_cases(self, names: list[str], end: float) -> None:
        for case in self.cases():
            if time.perf_counter() > end:
                print(f"no time is left for {names} of {case.name}", flush=True)
            else:
                for row in time_case(case, self.options.shapes, self.device, names):
                    self._add_row(row)

    def _add_row(self, row: report.Document) -> None:
        times = [f"{row[key]:.4f}" for key in ("forward_ms", "both_ms") if key in row]
        print(f"{row['op']}, {row['by']}: {row.get('failed') or ' / '.join(times) + ' ms'}", flush=True)
        self.add({"ops": {"bounds": [], "rows": [row]}})

    def steps(self) -> None:
        options = self.options
        length = TurnLength(options.warm_seconds, options.turn_seconds)
        plan = Plan(length, options.rounds, options.seconds, options.prepare_seconds)
        for name in options.sizes:
            size, sustained = SIZES[name], self.document["runs"][-1].get("ceilings", {}).get("sustained_tflops")

            def keep(figures: dict, size=size, sustained=sustained) -> None:
                self.add({"steps": {size.name: summarise(size, figures, sustained)}})

            keep(measure_size(size, options.variants or list(size.variants), plan, keep))
            for variant, found in self.document["steps"][name].items():
                rate = f"{found['tokens_s']:,.0f} tokens/s" if "ms" in found else found["failed"]
                print(f"{name} {variant}: {rate}", flush=True)


def wanted(name: str, patterns: list[str]) -> bool:
    return not patterns or any(pattern in name for pattern in patterns)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def describe_run(device: torch.device, command: str) -> dict[str, str]:
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    for package in CHANGES_FIGURES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions += f", {package} {importlib.metadata.version(package)}"
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": date, "device": device_name(device), "versions": versions, "command": command}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m scripts.bench", description=__doc__.split("\n")[0])
    sections = ("ceilings", "accuracy", "ops", "steps")
    parser.add_argument(
        "--sections",
        nargs="*",
        default=list(sections),
        choices=sections,
        metavar="SECTION",
        help=f"by default all: {', '.join(sections)}; none beside --from",
    )
    parser.add_argument("--sizes", nargs="+", default=list(MEASURED), choices=SIZES)
    parser.add_argument(
        "--variants",
        nargs="+",
        help="of the step: ours-PRECISION-SWITCHES, or a peer as tuned-amp; by default the size's",
    )
    parser.add_argument("--ops", nargs="+", default=[], metavar="TEXT", help="only ops with this in their name")
    parser.add_argument("--implementations", nargs="+", default=list(IMPLEMENTATIONS), choices=IMPLEMENTATIONS)
    parser.add_argument("--seconds", type=float, default=300.0, help="for all ops; for the turns of each size")
    parser.add_argument("--prepare-seconds", type=float, default=900.0, help="for starting and compiling a size")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each variant, at most")
    parser.add_argument("--turn-seconds", type=float, default=3.0)
    parser.add_argument("--warm-seconds", type=float, default=2.0, help="of load before each turn")
    parser.add_argument("--out", type=Path, default=Path("docs/measurements"))
    parser.add_argument("--name", help="of the three files; bench_DEVICE by default")
    parser.add_argument("--from", dest="sources", nargs="+", type=Path, default=[], help="JSON to add to")
    parser.set_defaults(shapes=Shapes(), checked_shapes=CHECKED_SHAPES, optimizer_size="1.4b")
    options = parser.parse_args(arguments)
    for name in options.variants or []:
        try:
            parse_variant(name)
        except ValueError as unknown:
            parser.error(str(unknown))
    names = [*(case.name for case in CASES), ADAMW]
    for text in options.ops:
        if not any(wanted(name, [text]) for name in names):
            parser.error(f"--ops {text!r}: no op has that in its name; there are {', '.join(map(repr, names))}")
    return options


def run(options: argparse.Namespace, device: torch.device, command: str) -> report.Document:
    bench = Bench(options, device, command)
    bench.write()
    try:
        for section in options.sections:
            getattr(bench, section)()
    finally:
        bench.write(whole=True)
    print(f"written: {bench.path} and .md, .png beside it", flush=True)
    return bench.document


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.sections and not torch.cuda.is_available():
        print("The benchmark needs a CUDA device and there is none here; `make bench-cpu` needs none.", file=sys.stderr)
        return NO_DEVICE
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run(options, device, shlex.join(["python", "-m", "scripts.bench", *arguments]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
