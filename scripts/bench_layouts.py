"""One recipe at several layouts beside each other and beside the peers: losses, tokens/s, peak memory.

    python scripts/bench_layouts.py --config recipes/pythia_1.4b.yaml --micro-batch 4 --global-batch 64 \
        --layouts data=1 data=2 tensor=2 pipeline=2 pipeline=2,compiled --against ddp ddp,compiled pipeline,compiled

What a layout is: `layout_runs.py`. The first one is what the others' losses are compared with. All start from the same
weights and see the same samples. Peers (`layout_peers.py`) run on as many devices as the largest layout.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from layout_runs import Figures, Run, largest_difference, parse_layout, run_ours, tokens_per_second, world_of
from peer_runs import run_peer

from neox_hf.training.recipe import load_recipe

PEERS = ("ddp", "ddp,compiled", "pipeline", "pipeline,compiled")
MEMORY = {"peak GiB": "peak_gib", "GiB held": "reserved_gib"}


def our_run(layout: dict[str, int], options: argparse.Namespace) -> Run:
    return Run(
        config=options.config,
        layout=layout,
        micro_batch=options.micro_batch,
        global_batch=options.global_batch,
        steps=options.steps + (options.profile is not None),
        settings=options.set,
    )


def peer_figures(text: str, options: argparse.Namespace, world: int, folder: Path) -> Figures:
    kind, _, compiled = text.partition(",")
    return run_peer(kind, our_run({}, options), world, folder, compiled=bool(compiled))


def rate_of(figures: Figures, options: argparse.Namespace) -> float:
    """Tokens/s of the median step."""
    return tokens_per_second(figures, options.seq_length, options.warmup)


def report(ours: dict[str, Figures], peers: dict[str, Figures], options: argparse.Namespace) -> None:
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
        keys = ("loss", "grad_norm")
        drift = [f"{largest_difference(figures, first, key):.1e}" if comparable else "-" for key in keys]
        memory = [f"{figures[key]:.1f}" for key in MEMORY.values()]
        print("| " + " | ".join([name, f"{rates[name]:,.0f}", *ratios, *memory, *drift]) + " |")
    for name, figures in ours.items():
        if figures:
            print(f"{name}: loss {[round(loss, 4) for loss in figures['loss']]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", nargs="+", required=True)
    parser.add_argument("--layouts", nargs="+", default=["data=1", "data=2"])
    parser.add_argument("--against", nargs="*", default=[], choices=PEERS, metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--global-batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--set", action="append", default=[], help="section.key=value, for our runs")
    parser.add_argument("--profile", type=Path, help="a folder: one more step, kernel by kernel, of each of our ranks")
    parser.add_argument("--json", type=Path, help="write every figure here")
    measure(parser.parse_args())


def measure(options: argparse.Namespace) -> None:
    """Run everything; what is known is printed and written after each run, for a run that is cut short."""
    world = max(world_of(parse_layout(text)) for text in options.layouts)
    if options.profile is not None:
        options.profile.mkdir(parents=True, exist_ok=True)
    options.seq_length = load_recipe(options.config, None, options.set).data.seq_length
    ours: dict[str, Figures] = {}
    peers: dict[str, Figures] = {}

    def note(name: str, figures: Figures) -> None:
        if figures:
            print(f"  {name}: {rate_of(figures, options):,.0f} tokens/s", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps({"ours": ours, "peers": peers}, indent=1))

    with tempfile.TemporaryDirectory() as folder:
        for text in options.layouts:
            print(f"ours: {text}", flush=True)
            more = [] if options.profile is None else ["--profile", str(options.profile / text)]
            ours[text] = run_ours(our_run(parse_layout(text), options), Path(folder), more=more)
            note(text, ours[text])
        for text in options.against:
            print(f"peer: {text}", flush=True)
            peers[f"peer {text}"] = peer_figures(text, options, world, Path(folder))
            note(text, peers[f"peer {text}"])
    report(ours, peers, options)


if __name__ == "__main__":
    main()
