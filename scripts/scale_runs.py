"""What `scale.py` runs on a number of devices: lists, and nothing that runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from layout_runs import Run, parse_layout

from neox_hf.planning import Device, Plan, plan

RECIPES = Path(__file__).parents[1] / "recipes"
DEVICES = (2, 4, 8)
STEPS, MORE_STEPS = 50, 10
"""Of the curves, and of those resumed from where the first ones left a checkpoint."""

WARMUP, MEASURED = 3, 5
"""Steps of a speed run."""

# The demo's tokenizer and text under a model that divides by eight stages and eight heads.
TINY = (
    "model.num_hidden_layers=8",
    "model.hidden_size=64",
    "model.num_attention_heads=8",
    "data.seq_length=64",
    "train.eval_on_start=false",
    "train.precision=fp32",
    "train.peak_tflops=1",
)


@dataclass(frozen=True)
class Bounds:
    """Largest relative differences from one device's curve that pass: of loss and of gradient norm, and of the loss of
    stock transformers from that of the step it is computed for."""

    loss: float
    norm: float
    stock: float


# Orders of summation alone, as in the tests of layouts (CONTRIBUTING.md).
FP32 = Bounds(loss=1e-5, norm=1e-5, stock=1e-5)
# What bf16 differs from fp32 on one device, which the report shows beside it. Norms are of single steps and noisier.
BF16 = Bounds(loss=1e-3, norm=3e-2, stock=1e-3)


@dataclass(frozen=True)
class Correctness:
    """`one` device's curve, which layouts `split` must follow; the first of them leaves a checkpoint after STEPS, from
    which layouts `resumed` go on. yardstick: settings of one more curve on one device, shown and not judged."""

    one: Run
    split: Sequence[str]
    resumed: Sequence[str]
    bounds: Bounds
    yardstick: Sequence[str] = ()

    def at(self, layout: str) -> Run:
        return replace(self.one, layout=parse_layout(layout))


SPLIT = {
    2: (("tensor=2,sequence", "pipeline=2", "data=2", "data=2,zero=1"), ("pipeline=2", "data=2")),
    4: (("tensor=2,pipeline=2,sequence", "data=2,tensor=2,sequence"), ("tensor=4", "pipeline=4")),
    8: (("data=2,tensor=2,pipeline=2,sequence",), ("data=2,tensor=4", "pipeline=8")),
}


def correctness_of(devices: int, cuda: bool) -> Correctness:
    """On CUDA Pythia-160M in bf16, 32,768 tokens a step; elsewhere a tiny model in fp32."""
    split, resumed = SPLIT[devices]
    # What is learned in so few steps. In bf16 slowly, and behind a warm-up: at 1e-4 from the first step gradients jump,
    # rounding grows, and by step 13 data=2, which but sums in another order, is 2e-3 away from one device.
    rate = ("train.learning_rate=5e-5", "train.lr_warmup_fraction=0.5") if cuda else ("train.learning_rate=1e-3",)
    curves = (*rate, "train.min_lr=1e-5", "train.max_grad_norm=1.0")
    name, settings = ("pythia_160m", ("train.precision=bf16",)) if cuda else ("demo", TINY)
    one = Run(
        config=[str(RECIPES / f"{name}.yaml")],
        layout={"data": 1},
        micro_batch=2 if cuda else 1,
        global_batch=16,
        steps=STEPS + MORE_STEPS,
        settings=(*settings, *curves),
    )
    return Correctness(one, split, resumed, BF16 if cuda else FP32, ("train.precision=fp32",) if cuda else ())


@dataclass(frozen=True, kw_only=True)
class SpeedRun:
    """One row of the table. peer: of `layout_peers.py`, instead of ours, with its options. limit: seconds."""

    model: str
    run: Run
    layout: str
    peer: str | None = None
    options: tuple[tuple[str, int], ...] = ()
    limit: float = 300

    @property
    def name(self) -> str:
        if self.peer is None:
            return f"{self.model} {self.layout}"
        options = "".join(f" {name}={value}" for name, value in self.options)
        return f"{self.model} peer {self.peer}{options}"

    @property
    def shorter(self) -> "SpeedRun | None":
        """The same with half the micro-batches, for a pipeline: the rest of the time is its bubble."""
        if self.peer or self.run.layout.get("pipeline", 1) == 1:
            return None
        return replace(self, run=replace(self.run, global_batch=self.run.global_batch // 2))


# model, recipe, micro-batch, seconds at most
MODELS = {"1.4B": ("pythia_1.4b", 8, 300), "6.9B": ("pythia_6.9b", 4, 420), "20B": ("neox_20b", 4, 600)}

# model, layout, samples a step; of peers: model, what, options, samples. The most telling ones first.
OURS = {
    8: (
        ("1.4B", "data=1", 64),
        ("1.4B", "data=8", 512),
        ("20B", "tensor=2,pipeline=4", 128),
        ("6.9B", "data=2,tensor=2,pipeline=2", 256),
        ("6.9B", "data=4,tensor=2", 256),
        ("6.9B", "data=8,zero=1", 256),
        ("20B", "tensor=4,pipeline=2", 128),
        ("20B", "tensor=8", 128),
    ),
    4: (
        ("1.4B", "data=1", 64),
        ("1.4B", "data=4", 256),
        ("20B", "tensor=2,pipeline=2", 64),
        ("20B", "tensor=4", 64),
        ("6.9B", "data=2,tensor=2", 128),
        ("6.9B", "tensor=2,pipeline=2", 128),
        ("6.9B", "data=4,zero=1", 128),
    ),
    2: (
        ("1.4B", "data=1", 64),
        ("1.4B", "data=2", 128),
        ("1.4B", "tensor=2", 128),
        ("1.4B", "pipeline=2", 128),
        ("1.4B", "data=2,zero=1", 128),
    ),
}
PEERS = {
    8: (
        ("1.4B", "ddp", (), 512),
        ("6.9B", "zero", (("stage", 1),), 256),
        ("20B", "zero", (("stage", 3), ("recompute", 1)), 128),
        ("6.9B", "zero", (("stage", 3),), 256),
    ),
    4: (
        ("1.4B", "ddp", (), 256),
        ("6.9B", "zero", (("stage", 1),), 128),
        ("20B", "zero", (("stage", 3), ("recompute", 1)), 64),
    ),
    2: (("1.4B", "ddp", (), 128), ("1.4B", "zero", (("stage", 1),), 128), ("1.4B", "zero", (("stage", 3),), 128)),
}


def speed_runs(devices: int, cuda: bool) -> list[SpeedRun]:
    """In the order in which they run."""
    model = _model if cuda else _tiny
    ours = [
        SpeedRun(**model(name, samples), layout=layout, run=_run(name, cuda, samples, layout))
        for name, layout, samples in OURS[devices]
    ]
    everywhere = f"data={devices}"
    peers = [
        SpeedRun(
            **model(name, samples),
            layout=everywhere,
            run=_run(name, cuda, samples, everywhere),
            peer=peer,
            options=options,
        )
        for name, peer, options, samples in PEERS[devices]
    ]
    runs = ours + peers
    return runs if cuda else _once_each(runs)


def _model(name: str, samples: int) -> dict:
    return {"model": name, "limit": MODELS[name][2]}


def _tiny(name: str, samples: int) -> dict:
    return {"model": "tiny"}


def _run(name: str, cuda: bool, samples: int, layout: str) -> Run:
    recipe, micro_batch, _ = MODELS[name] if cuda else ("demo", 1, 0)
    return Run(
        config=[str(RECIPES / f"{recipe}.yaml")],
        layout=parse_layout(layout),
        micro_batch=micro_batch,
        global_batch=samples if cuda else 16,
        steps=WARMUP + MEASURED,
        settings=() if cuda else TINY,
    )


def _once_each(runs: Sequence[SpeedRun]) -> list[SpeedRun]:
    """Without a GPU all models are one, and rows that were told apart by them are the same."""
    return list({run.name: run for run in runs}.values())


ROOM = 0.85
"""Share of a device's memory that a run may be planned to take: what graphs and the allocator hold came to a tenth more
(docs/measurements/layouts_h200_x2.md: 75 GiB, planned at 68), and no run is tried twice."""


def fitting(run: Run, device: Device | None, folder: Path) -> tuple[Run, Plan | None]:
    """`run` with as little recomputed as a plan for `device` finds room for, and that plan; none for a device that
    planning does not know."""
    if device is None:
        return run, None
    modes = ("none", "full") if run.layout.get("zero") == 3 else ("none", "selective", "full")  # ZeRO-3 refuses it
    for mode in modes:
        chosen = replace(run, settings=(*run.settings, f"train.activation_checkpointing={mode}"))
        found = plan(chosen.recipe(folder), run.world, device)
        if found.fullest.peak <= ROOM * device.gib:
            break
    return chosen, found
