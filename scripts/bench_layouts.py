"""One recipe at several layouts beside each other and beside the peers: losses, tokens/s, peak memory.

    python scripts/bench_layouts.py --config recipes/pythia_1.4b.yaml --micro-batch 4 --global-batch 64 \
        --layouts data=1 data=2 tensor=2 pipeline=2 pipeline=2,compiled --against ddp ddp,compiled pipeline,compiled

A layout is sizes and switches, joined by commas: `data`, `tensor`, `pipeline`, `zero` (the ZeRO stage), `sequence`,
`compiled`, `graphs` (CUDA graphs of the layers; `graphs=0`: none), `micro` (another micro-batch), `samples` (another
global batch: one that grows with the devices tells what a device loses by having company). The first one is what
the others' losses are compared with. All start from the same weights and see the same samples. Peers
(`layout_peers.py`) run on as many devices as the largest layout.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peak_memory import peak_memory
from transformers import TrainerCallback

from neox_hf.modeling.settings import model_config
from neox_hf.training.pretraining import build_trainer
from neox_hf.training.recipe import load_recipe

PEERS = Path(__file__).with_name("layout_peers.py")
SIZES = ("data", "tensor", "pipeline", "zero", "micro", "samples")
SWITCHES = ("sequence", "compiled", "graphs", "ddp")
PEER_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
MEMORY = {"peak GiB": "peak_gib", "GiB held": "reserved_gib"}
TIMEOUT_SECONDS = 300


def parse_layout(text: str) -> dict[str, int]:
    """`tensor=2,sequence` -> {"tensor": 2, "sequence": 1}."""
    layout = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in (*SIZES, *SWITCHES):
            raise SystemExit(f"{part!r} in {text!r} is no size or switch of a layout")
        layout[name] = int(value or 1)
    return layout


def world_of(layout: dict[str, int]) -> int:
    return layout.get("data", 1) * layout.get("tensor", 1) * layout.get("pipeline", 1)


def samples_of(layout: dict[str, int], options: argparse.Namespace) -> int:
    return layout.get("samples", options.global_batch)


def overrides_of(layout: dict[str, int], options: argparse.Namespace, folder: Path) -> list[str]:
    return [
        f"parallel.tensor={layout.get('tensor', 1)}",
        f"parallel.pipeline={layout.get('pipeline', 1)}",
        f"parallel.sequence={str(bool(layout.get('sequence'))).lower()}",
        f"parallel.zero_stage={layout.get('zero', 0)}",
        f"train.torch_compile={str(bool(layout.get('compiled'))).lower()}",
        f"train.cuda_graphs={str(bool(layout['graphs'])).lower() if 'graphs' in layout else 'auto'}",
        f"train.per_device_train_batch_size={layout.get('micro', options.micro_batch)}",
        f"train.global_batch_size={samples_of(layout, options)}",
        f"train.max_steps={options.steps}",
        f"train.output_dir={folder / 'out'}",
        "train.save_schedule=none",
        "train.eval_strategy=no",
        "train.report_to=[]",
        "train.logging_steps=1",
        "train.lr_warmup_fraction=0",
        "train.disable_tqdm=true",
        "train.resume_from_checkpoint=null",
        *options.set,
    ]


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


def work(options: argparse.Namespace) -> None:
    """One rank of one of our layouts."""
    recipe = load_recipe(options.config, None, options.set)
    args = recipe.training_arguments()
    topology = recipe.topology(args.world_size, args.process_index).connect()
    trainer = build_trainer(recipe, args, topology)
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train()
    peak = peak_memory()
    if topology.rank == 0:
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        figures = {name: [entry[name] for entry in logs] for name in ("loss", "grad_norm")}
        options.worker.write_text(json.dumps({**figures, "seconds": clock.seconds, **peak}))
    trainer.loader.close()


def launch(world: int, command: list[str], result: Path, samples: int) -> dict[str, Any]:
    """Run one variant of `samples` a step; what it measured, or nothing where it failed."""
    result.unlink(missing_ok=True)
    begin = time.perf_counter()
    launcher = [sys.executable]
    if world > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if world == 1:
        environment["CUDA_VISIBLE_DEVICES"] = "0"  # one process does not drive several GPUs
    done = subprocess.run(
        [*launcher, *command], capture_output=True, text=True, env=environment, timeout=TIMEOUT_SECONDS, check=False
    )
    print(f"  {time.perf_counter() - begin:.0f} s, exit {done.returncode}", flush=True)
    if done.returncode or not result.exists():
        print(done.stdout[-1500:], done.stderr[-3500:], flush=True)
        return {}
    return {**json.loads(result.read_text()), "samples": samples}


def run_ours(text: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    layout = parse_layout(text)
    result = folder / "result.json"
    settings = [f"--set={override}" for override in overrides_of(layout, options, folder)]
    command = [__file__, "--config", *options.config, *settings, "--worker", str(result)]
    return launch(world_of(layout), command, result, samples_of(layout, options))


def run_peer(text: str, options: argparse.Namespace, world: int, folder: Path) -> dict[str, Any]:
    layout = parse_layout(text)
    kind = "ddp" if "ddp" in layout else "pipeline"
    recipe = load_recipe(options.config, None, overrides_of({}, options, folder))
    config = model_config(recipe.model, tokens=recipe.tokenizer.vocab_size or 0, seq_length=recipe.data.seq_length)
    samples = options.global_batch // options.micro_batch
    job = {
        "model": {name: getattr(config, name) for name in PEER_FIELDS},
        "micro_batch": options.micro_batch,
        "accumulation": samples // world if kind == "ddp" else samples,
        "seq_length": recipe.data.seq_length,
        "steps": options.steps,
        "compiled": bool(layout.get("compiled")),
    }
    result = folder / "result.json"
    return launch(world, [str(PEERS), kind, str(result), json.dumps(job)], result, options.global_batch)


def rate_of(figures: dict[str, Any], options: argparse.Namespace) -> float:
    """Tokens/s of the median step."""
    return figures["samples"] * options.seq_length / statistics.median(figures["seconds"][options.warmup :])


def report(ours: dict[str, dict], peers: dict[str, dict], options: argparse.Namespace) -> None:
    """The table."""
    runs = {**ours, **peers}
    rates = {name: rate_of(figures, options) for name, figures in runs.items() if figures}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    tokens, steps = options.global_batch * options.seq_length, options.steps - options.warmup
    print(f"\n{device}, torch {torch.__version__}; {tokens:,} tokens a step, medians of {steps}")
    columns = ["layout", "tokens/s", *(f"/ {name}" for name in peers), *MEMORY, "loss differs by", "norm differs by"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    first = next((figures for figures in ours.values() if figures), {})
    for name, figures in runs.items():
        if not figures:
            print(f"| {name} | failed |")
            continue
        ratios = [f"{rates[name] / rates[peer]:.3f}" if peer in rates else "-" for peer in peers]
        comparable = "loss" in figures and figures["samples"] == first["samples"]
        drift = [f"{difference(figures, first, key):.1e}" if comparable else "-" for key in ("loss", "grad_norm")]
        memory = [f"{figures[key]:.1f}" for key in MEMORY.values()]
        print("| " + " | ".join([name, f"{rates[name]:,.0f}", *ratios, *memory, *drift]) + " |")
    for name, figures in ours.items():
        if figures:
            print(f"{name}: loss {[round(loss, 4) for loss in figures['loss']]}")


def difference(figures: dict, first: dict, key: str) -> float:
    """The largest relative difference of any step."""
    return max(abs(a - b) / abs(b) for a, b in zip(figures[key], first[key], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", nargs="+", required=True)
    parser.add_argument("--layouts", nargs="+", default=["data=1", "data=2"])
    parser.add_argument("--against", nargs="*", default=[])
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--global-batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--set", action="append", default=[], help="section.key=value, for our runs")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options)
        return
    measure(options)


def measure(options: argparse.Namespace) -> None:
    """Run everything; what is known is printed and written after each run, for a run that is cut short."""
    world = max(world_of(parse_layout(text)) for text in options.layouts)
    options.seq_length = load_recipe(options.config, None, options.set).data.seq_length
    ours: dict[str, dict] = {}
    peers: dict[str, dict] = {}

    def note(name: str, figures: dict[str, Any]) -> None:
        if figures:
            print(f"  {name}: {rate_of(figures, options):,.0f} tokens/s", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps({"ours": ours, "peers": peers}, indent=1))

    with tempfile.TemporaryDirectory() as folder:
        for text in options.layouts:
            print(f"ours: {text}", flush=True)
            ours[text] = run_ours(text, options, Path(folder))
            note(text, ours[text])
        for text in options.against:
            print(f"peer: {text}", flush=True)
            peers[f"peer {text}"] = run_peer(text, options, world, Path(folder))
            note(text, peers[f"peer {text}"])
    report(ours, peers, options)


if __name__ == "__main__":
    main()
