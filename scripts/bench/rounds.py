"""All variants of one size, a process each, taking turns: A B C, C B A, A B C.

Whatever drifts, the card's temperature above all, meets all of them alike. Peers compile at the same time, as many as
fit into the device's memory, and no variant holds any of it between its turns.
"""

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.bench.sizes import Size
from scripts.bench.turns import TurnLength
from scripts.bench.variants import parse_variant
from scripts.bench.worker import MARK

CONTEXT_GIB = 0.8
"""What a process holds on the device for being there."""

SPARE_GIB = 6.0
SECONDS_TO_END = 10
SECONDS_BEYOND_A_TURN = 90
"""Building the model, its first steps and freeing it, before a turn counts as stuck."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """length: of a turn. rounds: turns of each variant, at most. seconds: for all turns. prepare_seconds: for starting
    and compiling, before."""

    length: TurnLength
    rounds: int = 3
    seconds: float = 90.0
    prepare_seconds: float = 300.0


class Worker:
    """A variant's process. Use it as a context: it ends with it."""

    def __init__(self, size: Size, variant: str, folder: Path) -> None:
        self.log = folder / f"{variant}.log"
        self._answers: queue.Queue[Figures] = queue.Queue()
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "scripts.bench.worker", size.name, variant],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            if line.startswith(MARK):
                self._answers.put(json.loads(line.removeprefix(MARK)))
        self._answers.put({"failed": f"ended: {self._last_words()}"})

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "without a word"

    def ask(self, request: str, seconds: float) -> Figures:
        """The first request, whatever it is, is to get ready; each further one is a turn."""
        try:
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"failed": f"ended: {self._last_words()}"}
        try:
            return self._answers.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            self.end(patience=0)
            return {"failed": f"no answer within {max(seconds, 0):.0f} s"}

    def turn(self, length: TurnLength) -> Figures:
        seconds = length.warm_seconds + length.seconds + SECONDS_BEYOND_A_TURN
        return self.ask(json.dumps(dataclasses.asdict(length)), seconds)

    def end(self, patience: float = SECONDS_TO_END) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Memory:
    """GiB of a device, given to who asks for so much once it is there. More than there is, is all of it."""

    def __init__(self, gib: float) -> None:
        self.total = self.free = gib
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, gib: float) -> Iterator[None]:
        gib = min(gib, self.total)
        with self._changed:
            self._changed.wait_for(lambda: self.free >= gib)
            self.free -= gib
        try:
            yield
        finally:
            with self._changed:
                self.free += gib
                self._changed.notify_all()


def needed_gib(size: Size, variant: str) -> float:
    """About what a variant takes; ours with fp32 masters as much as a peer in amp."""
    return size.peak_gib[parse_variant(variant).numeric_class]


def device_gib(processes: int) -> float:
    if not torch.cuda.is_available():
        return 8.0
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    return total - SPARE_GIB - processes * CONTEXT_GIB


def measure_size(
    size: Size, variants: list[str], plan: Plan, report: Callable[[dict[str, Figures]], None]
) -> dict[str, Figures]:
    """Figures by variant: `turns`, `prepare_seconds`, and why it `failed`. report: gets them after each turn."""
    figures: dict[str, Figures] = {variant: {"turns": []} for variant in variants}
    with tempfile.TemporaryDirectory() as folder:
        workers = prepare(size, figures, plan, Path(folder))
        try:
            take_turns(workers, figures, plan, report)
        finally:
            for worker in workers.values():
                worker.end()
    return figures


def prepare(size: Size, figures: dict[str, Figures], plan: Plan, folder: Path) -> dict[str, Worker]:
    """Start and compile all variants; those that are ready in time. Ours are first and have the device to themselves,
    since they measure which algorithms compute their products; the others import everything meanwhile."""
    memory, ready = Memory(device_gib(len(figures))), {}
    begin = time.perf_counter()
    workers = {variant: Worker(size, variant, folder) for variant in figures}

    def compile_(variant: str) -> None:
        with memory.hold(needed_gib(size, variant)):
            said = workers[variant].ask("", begin + plan.prepare_seconds - time.perf_counter())
        if "failed" in said:
            workers[variant].end()
            figures[variant]["failed"] = said["failed"]
        else:
            ready[variant] = workers[variant]
        seconds = figures[variant]["prepare_seconds"] = time.perf_counter() - begin
        print(f"{size.name} {variant}: {said.get('failed', 'ready')} after {seconds:.0f} s", flush=True)

    ours = [variant for variant in figures if parse_variant(variant).is_ours]
    for variant in ours:
        compile_(variant)
    # Of the others, those that compile longest go first.
    others = sorted(set(figures) - set(ours), key=lambda variant: variant.startswith("eager"))
    threads = [threading.Thread(target=compile_, args=(variant,)) for variant in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {variant: ready[variant] for variant in figures if variant in ready}


def take_turns(
    workers: dict[str, Worker], figures: dict[str, Figures], plan: Plan, report: Callable[[dict[str, Figures]], None]
) -> None:
    end, longest = time.perf_counter() + plan.seconds, 0.0
    for round_ in range(plan.rounds):
        # Every other round runs backwards, so that no variant always follows the same one.
        for variant in list(workers)[:: 1 if round_ % 2 == 0 else -1]:
            begin = time.perf_counter()
            if "failed" in figures[variant] or begin + longest > end:
                continue
            answer = workers[variant].turn(plan.length)
            longest = max(longest, time.perf_counter() - begin)
            if "failed" in answer:
                figures[variant]["failed"] = answer["failed"]
            else:
                figures[variant]["turns"].append(answer)
            report(figures)
