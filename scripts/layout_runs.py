"""One recipe at one layout, in processes of its own: what `bench_layouts.py` and `scale.py` launch, and the rank that
runs there.

A layout is sizes and switches, joined by commas: `data`, `tensor`, `pipeline`, `zero` (the ZeRO stage), `sequence`,
`backend` (messages of two tensor ranks by NCCL, not by copies), `compiled`, `graphs` (CUDA graphs of the layers;
`graphs=0`: none), `micro` (another micro-batch), `samples` (another global batch: one that grows with the devices tells
what a device loses by having company), `selective` (recomputation), `card` (which of the devices a process alone has,
from 0: no two are equally fast, and a layout is as fast as its slowest).
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from layout_profile import StepProfile
from peak_memory import peak_memory
from transformers import TrainerCallback

from neox_hf.parallel.collectives import end_of_gloo
from neox_hf.training.launch_environment import prepare_deepspeed_on_cpu
from neox_hf.training.pretraining import build_trainer
from neox_hf.training.recipe import Recipe, load_recipe
from neox_hf.training.trainer import NeoXTrainer

SIZES = ("data", "tensor", "pipeline", "zero", "micro", "samples", "card")
SWITCHES = ("sequence", "backend", "compiled", "graphs", "selective")
TIMEOUT_SECONDS = 300

Figures = dict[str, Any]
"""What a run measured: `loss` and `grad_norm` by step, `seconds` of each, `peak_gib`, `reserved_gib`, `samples` a step.
Empty where it failed."""


def parse_layout(text: str) -> dict[str, int]:
    """`tensor=2,sequence` -> {"tensor": 2, "sequence": 1}."""
    layout = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in (*SIZES, *SWITCHES):
            raise SystemExit(f"{part!r} in {text!r} is no size or switch of a layout")
        layout[name] = int(value or 1)
    return layout


def world_of(layout: Mapping[str, int]) -> int:
    return layout.get("data", 1) * layout.get("tensor", 1) * layout.get("pipeline", 1)


@dataclass(frozen=True, kw_only=True)
class Run:
    """config: the recipe's files. settings: `section.key=value`, which win over what the layout comes to."""

    config: Sequence[str]
    layout: Mapping[str, int]
    micro_batch: int
    global_batch: int
    steps: int
    settings: Sequence[str] = ()

    @property
    def world(self) -> int:
        return world_of(self.layout)

    @property
    def samples(self) -> int:
        """In a step."""
        return self.layout.get("samples", self.global_batch)

    def overrides(self, folder: Path) -> list[str]:
        """Of the recipe. folder: where the run may write."""
        layout = self.layout
        return [
            f"parallel.tensor={layout.get('tensor', 1)}",
            f"parallel.pipeline={layout.get('pipeline', 1)}",
            f"parallel.sequence={str(bool(layout.get('sequence'))).lower()}",
            f"parallel.messages={'backend' if layout.get('backend') else 'auto'}",
            f"parallel.zero_stage={layout.get('zero', 0)}",
            f"train.torch_compile={str(bool(layout.get('compiled'))).lower()}",
            f"train.cuda_graphs={str(bool(layout['graphs'])).lower() if 'graphs' in layout else 'auto'}",
            f"train.per_device_train_batch_size={layout.get('micro', self.micro_batch)}",
            f"train.global_batch_size={self.samples}",
            f"train.max_steps={self.steps}",
            f"train.output_dir={folder / 'out'}",
            "train.save_schedule=none",
            "train.eval_strategy=no",
            "train.report_to=[]",
            "train.logging_steps=1",
            "train.lr_warmup_fraction=0",
            "train.disable_tqdm=true",
            "train.resume_from_checkpoint=null",
            *(["train.activation_checkpointing=selective"] if layout.get("selective") else []),
            *self.settings,
        ]

    def recipe(self, folder: Path) -> Recipe:
        return load_recipe(self.config, None, self.overrides(folder))

    def command(self, folder: Path, result: Path) -> list[str]:
        """What one rank of it is told to do."""
        settings = [f"--set={override}" for override in self.overrides(folder)]
        return [__file__, "--config", *self.config, *settings, "--result", str(result)]


def run_ours(run: Run, folder: Path, timeout: float = TIMEOUT_SECONDS, more: Sequence[str] = ()) -> Figures:
    """Launch `run`. more: arguments of the ranks."""
    result = folder / "result.json"
    card = run.layout.get("card", 0)
    figures = launch(run.world, [*run.command(folder, result), *more], result, timeout, card)
    return {**figures, "samples": run.samples} if figures else {}


def launch(
    world: int, command: Sequence[str], result: Path, timeout: float = TIMEOUT_SECONDS, card: int = 0
) -> Figures:
    """Start `world` ranks of `command`; what the first one wrote to `result`, or nothing where it failed or took more
    than `timeout` seconds. card: of the devices, the one that a rank alone has."""
    result.unlink(missing_ok=True)
    begin = time.perf_counter()
    launcher = [sys.executable]
    if world > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    code, output = run_command([*launcher, *command], _environment(world, card), timeout)
    print(f"  {time.perf_counter() - begin:.0f} s, exit {code}", flush=True)
    if code or not result.exists():
        print(output[-5000:], flush=True)
        return {}
    return json.loads(result.read_text())


def _environment(world: int, card: int = 0) -> dict[str, str]:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if not torch.cuda.is_available():
        prepare_deepspeed_on_cpu()
        # One thread each, as torchrun has it for several: a process alone then sums in the same order.
        environment = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
    if world == 1:
        # One process does not drive several GPUs.
        environment["CUDA_VISIBLE_DEVICES"] = _only_card(card, environment.get("CUDA_VISIBLE_DEVICES"))
    return environment


def _only_card(card: int, visible: str | None) -> str:
    """The name of one of the devices that may be seen; on a host without any it does not matter."""
    if torch.cuda.is_available() and card >= torch.cuda.device_count():
        raise SystemExit(f"card={card}: this host shows {torch.cuda.device_count()} devices, counted from 0")
    return visible.split(",")[card] if visible else str(card)


def run_command(command: Sequence[str], environment: Mapping[str, str], timeout: float) -> tuple[int, str]:
    """Exit code and output. What takes longer than `timeout` seconds is ended with all that it started: 124."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=dict(environment),
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException as error:  # an interrupted benchmark leaves no ranks behind either
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return 124, f"{output}\nstopped after {timeout:.0f} s"
    return process.returncode, output


def tokens_per_second(figures: Figures, seq_length: int, warmup: int) -> float:
    """Of the median step after the first `warmup`."""
    return figures["samples"] * seq_length / statistics.median(figures["seconds"][warmup:])


def largest_difference(figures: Figures, first: Figures, key: str) -> float:
    """The largest relative difference of `loss` or `grad_norm` of any step."""
    return max(abs(a - b) / abs(b) for a, b in zip(figures[key], first[key], strict=True))


class StepClock(TrainerCallback):
    """Seconds of each step, the device's queue emptied after it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._begin)


class SampleRecorder:
    """Keeps what the trainer reads in the step after `step`: token ids and next tokens of each sample."""

    def __init__(self, trainer: NeoXTrainer, step: int) -> None:
        self.samples: dict[str, list[list[int]]] = {"input_ids": [], "shift_labels": []}
        self._trainer, self._train, self._step = trainer, trainer.training_step, step
        trainer.training_step = self._training_step

    def _training_step(self, model: Any, inputs: dict[str, Any], *given: Any, **named: Any) -> Any:
        if self._trainer.state.global_step == self._step:
            for name, rows in self.samples.items():
                rows += inputs[name].tolist()
        return self._train(model, inputs, *given, **named)


@end_of_gloo()
def work(options: argparse.Namespace) -> None:
    """One rank."""
    recipe = load_recipe(options.config, None, options.set)
    args = recipe.training_arguments()
    topology = recipe.topology(args.world_size, args.process_index).connect()
    trainer = build_trainer(recipe, args, topology)
    clock = StepClock()
    trainer.add_callback(clock)
    if options.profile is not None:
        trainer.add_callback(StepProfile(options.profile.with_suffix(f".rank{topology.rank}.txt")))
    recorder = SampleRecorder(trainer, options.samples_of_step) if options.samples_of_step is not None else None
    trainer.train(args.resume_from_checkpoint)
    peak = peak_memory()
    if topology.rank == 0:
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        figures = {name: [entry[name] for entry in logs] for name in ("loss", "grad_norm")}
        recorded = {"recorded": recorder.samples} if recorder else {}
        seconds = clock.seconds if options.profile is None else clock.seconds[:-1]
        options.result.write_text(json.dumps({**figures, "seconds": seconds, **peak, **recorded}))
    trainer.loader.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", nargs="+", required=True)
    parser.add_argument("--set", action="append", default=[], help="section.key=value")
    parser.add_argument("--result", type=Path, required=True, help="where the first rank writes what it measured")
    parser.add_argument("--profile", type=Path, help="profile the last step, which is not timed: PROFILE.rank0.txt ...")
    parser.add_argument("--samples-of-step", type=int, help="record what the step after this one reads")
    work(parser.parse_args())


if __name__ == "__main__":
    main()
